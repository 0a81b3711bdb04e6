"""Statistics: equal to numpy's, masked, mergeable, and free of drift over a million tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax import statistics
from any4_jax.statistics import AbsMax, Gathered, Hessian, Largest, Moments, Sample

K = 6
update = jax.jit(statistics.update)
from_activations = jax.jit(statistics.from_activations, static_argnames="statistics")
BOTH = (Moments(), AbsMax())


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return (0.3 + np.random.default_rng(seed).standard_normal((*shape, K))).astype(np.float32)


def check(gathered: Gathered, x: np.ndarray, rtol: float = 1e-6) -> None:
    """`gathered` are those of the tokens x [T, K]."""
    x, stats = x.astype(np.float64), gathered[Moments()]
    assert int(stats.count) == len(x)
    for name, expected in (("mean", x), ("mean_abs", np.abs(x)), ("second_moment", x**2)):
        np.testing.assert_allclose(getattr(stats, name), expected.mean(axis=0), rtol=rtol, atol=rtol)
    np.testing.assert_array_equal(gathered[AbsMax()], np.abs(x).max(axis=0).astype(np.float32))


def test_equal_to_numpy() -> None:
    x = tokens(3, 50)
    check(statistics.from_activations(x), x.reshape(-1, K))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_activations_are_summed_in_float32(dtype: str) -> None:
    x = jnp.asarray(tokens(5000), dtype)
    check(from_activations(x), np.asarray(x, np.float32), rtol=1e-5)


def test_masked_tokens_leave_no_trace() -> None:
    x = tokens(2, 8)
    mask = np.arange(8) < np.array([[8], [3]])
    poisoned = np.where(mask[..., None], x, np.nan)
    check(from_activations(poisoned, mask), x[mask])


def test_batches_and_merge_equal_one_pass() -> None:
    x = tokens(4, 40)
    running = statistics.empty(K, BOTH)
    for part in x:
        running = update(running, part)
    check(running, x.reshape(-1, K))
    halves = [from_activations(half) for half in (x[:1], x[1:])]
    check(statistics.merge(*halves), x.reshape(-1, K))


def test_sums_do_not_drift_over_a_million_tokens() -> None:
    """500 batches whose plain float32 running sum would be off by 1e-5 of the mean or more."""
    x = np.abs(tokens(2000)) + 1
    running, plain = statistics.empty(K, BOTH), np.zeros(K, np.float32)
    batch = x.sum(axis=0, dtype=np.float64).astype(np.float32)
    for _ in range(500):
        running = update(running, x)
        plain += batch
    exact = x.astype(np.float64).mean(axis=0)
    moments = running[Moments()]
    ours = np.abs(moments.mean - exact) / exact
    assert int(moments.count) == 10**6
    # What is left is the float32 sum within a batch.
    assert ours.max() < 1e-6
    assert ours.max() < np.abs(plain / 1e6 - exact).max()


def test_cancelling_values_are_kept() -> None:
    """Adding 1 to 1e8 is lost in float32; the compensation holds it."""
    big, one = np.full((1, K), 1e8, np.float32), np.ones((1, K), np.float32)
    running = statistics.empty(K, BOTH)
    for part in (big, one, one, -big):
        running = update(running, part)
    np.testing.assert_allclose(running[Moments()].mean, 0.5)


def test_no_tokens_give_zeros() -> None:
    stats = update(statistics.empty(K, BOTH), tokens(4), np.zeros(4, bool))
    assert int(stats[Moments()].count) == 0
    assert not np.asarray(stats[Moments()].mean).any() and not np.asarray(stats[AbsMax()]).any()


def test_a_sample_is_of_the_tokens_however_they_are_batched() -> None:
    x, mask = tokens(4, 40), np.arange(40) < np.array([[40], [31], [1], [12]])
    sample = Sample(16)
    whole = from_activations(x, mask, statistics=(sample,))[sample].x
    running = statistics.empty(K, (sample,))
    for part, kept in zip(x, mask, strict=True):
        running = update(running, part, kept)
    np.testing.assert_array_equal(running[sample].x, whole)
    rows = {row.tobytes() for row in x[mask]}
    assert len({row.tobytes() for row in np.asarray(whole)} & rows) == 16


def test_a_sample_is_even_over_the_tokens() -> None:
    """Of 4000 tokens 1000 are kept: about a quarter of each tenth of them (standard deviation 4.3 in 100)."""
    x = np.arange(4000, dtype=np.float32)[:, None]
    kept = np.asarray(from_activations(x, statistics=(Sample(1000),))[Sample(1000)].x)[:, 0]
    counts = np.histogram(kept, bins=10, range=(0, 4000))[0]
    assert len(set(kept)) == 1000
    assert (abs(counts - 100) < 40).all()


def test_a_sample_of_few_tokens_ends_with_zeros() -> None:
    stats = statistics.merge(*(from_activations(x, statistics=(Sample(8),)) for x in tokens(2, 3)))
    assert (np.abs(np.asarray(stats[Sample(8)].x)).max(axis=1) > 0).tolist() == [True] * 6 + [False] * 2


def test_the_largest_tokens_are_kept_however_they_are_batched() -> None:
    x, mask = tokens(4, 40), np.arange(40) < np.array([[40], [31], [1], [12]])
    largest = Largest(8)
    running = statistics.empty(K, (largest,))
    for part, kept in zip(x, mask, strict=True):
        running = update(running, part, kept)
    sizes = np.square(x[mask]).sum(axis=1)
    for kept in (running, from_activations(x, mask, statistics=(largest,))):
        np.testing.assert_array_equal(kept[largest].x, x[mask][np.argsort(-sizes)[:8]])
        assert int(kept[largest].count) == mask.sum()


def hessian(x: np.ndarray) -> np.ndarray:
    """The mean of x x^T in float64."""
    x = x.astype(np.float64).reshape(-1, x.shape[-1])
    return x.T @ x / len(x)


def test_a_hessian_is_the_mean_product_in_full_precision_and_symmetric() -> None:
    x = np.random.default_rng(0).standard_normal((8, 512, 40)).astype(np.float32) * np.logspace(-2, 2, 40, dtype="f")
    running = statistics.empty(40, (Hessian(),))
    for batch in x:
        running = update(running, batch)
    found = np.asarray(running[Hessian()].mean)
    np.testing.assert_array_equal(found, found.T)
    exact = hessian(x)
    # Relative to the size of each pair of features: what products of fewer bits (TF32: 5e-4) miss by far.
    size = np.sqrt(np.diag(exact))
    assert (np.abs(found - exact) / np.outer(size, size)).max() < 2e-6
    halves = [from_activations(half, statistics=(Hessian(),)) for half in (x[:3], x[3:])]
    np.testing.assert_allclose(statistics.merge(*halves)[Hessian()].mean, found, rtol=1e-4, atol=1e-4)


def test_experts_have_the_statistics_of_the_tokens_that_reached_them() -> None:
    x, mask = tokens(2, 30), np.arange(30) < np.array([[30], [11]])
    routed = np.random.default_rng(1).random((3, 2, 30)) < [[[0.6]], [[0.2]], [[0.0]]]
    wanted = (*BOTH, Hessian(), Sample(4))
    seen = update(statistics.empty(K, wanted, experts=3), x, mask, routed)
    for expert, reached in enumerate(routed & mask):
        own = seen.of_expert(expert)
        if reached.any():
            check(own, x[reached])
            np.testing.assert_allclose(own[Hessian()].mean, hessian(x[reached]), rtol=1e-5, atol=1e-5)
        else:
            assert int(own[Moments()].count) == 0 and not np.asarray(own[Sample(4)].x).any()
    twice = statistics.merge(seen, seen).of_expert(0)
    check(twice, np.concatenate([x[routed[0] & mask]] * 2))


def test_scaled_statistics_are_those_of_the_scaled_input() -> None:
    x, factor = tokens(50), np.exp(np.linspace(-2, 2, K)).astype(np.float32)
    wanted = (*BOTH, Hessian(), Sample(8))
    ours, theirs = (
        from_activations(x, statistics=wanted).scaled(factor),
        from_activations(x * factor, statistics=wanted),
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-5)
    routed = np.random.default_rng(1).random((3, 50)) < 0.6
    stacked = update(statistics.empty(K, wanted, experts=3), x, None, routed)
    check(stacked.scaled(factor).of_expert(1), (x * factor)[routed[1]], rtol=2e-6)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="inputs of shape \\(3, 7\\) for statistics of K=6"):
        statistics.update(statistics.empty(K, BOTH), np.ones((3, 7), np.float32))
    with pytest.raises(ValueError, match="routed to \\(2,\\) experts for statistics of \\(\\)"):
        statistics.update(statistics.empty(K, BOTH), tokens(3), None, np.ones((2, 3), bool))
    with pytest.raises(ValueError, match="merge those of one input"):
        statistics.merge(statistics.empty(K, BOTH), statistics.empty(K + 1, BOTH))
