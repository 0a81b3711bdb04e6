"""Statistics: equal to numpy's, masked, mergeable, and free of drift over a million tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax import statistics

K = 6
update = jax.jit(statistics.update)
from_activations = jax.jit(statistics.from_activations, static_argnames="samples")


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return (0.3 + np.random.default_rng(seed).standard_normal((*shape, K))).astype(np.float32)


def check(stats: statistics.Statistics, x: np.ndarray, rtol: float = 1e-6) -> None:
    """`stats` are those of the tokens x [T, K]."""
    x = x.astype(np.float64)
    assert int(stats.count) == len(x)
    for name, expected in (("mean", x), ("mean_abs", np.abs(x)), ("second_moment", x**2)):
        np.testing.assert_allclose(getattr(stats, name), expected.mean(axis=0), rtol=rtol, atol=rtol)
    np.testing.assert_array_equal(stats.absmax, np.abs(x).max(axis=0).astype(np.float32))


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
    running = statistics.empty(K)
    for part in x:
        running = update(running, part)
    check(running, x.reshape(-1, K))
    halves = [from_activations(half) for half in (x[:1], x[1:])]
    check(statistics.merge(*halves), x.reshape(-1, K))


def test_sums_do_not_drift_over_a_million_tokens() -> None:
    """500 batches whose plain float32 running sum would be off by 1e-5 of the mean or more."""
    x = np.abs(tokens(2000)) + 1
    running, plain = statistics.empty(K), np.zeros(K, np.float32)
    batch = x.sum(axis=0, dtype=np.float64).astype(np.float32)
    for _ in range(500):
        running = update(running, x)
        plain += batch
    exact = x.astype(np.float64).mean(axis=0)
    ours = np.abs(running.mean - exact) / exact
    assert int(running.count) == 10**6
    # What is left is the float32 sum within a batch.
    assert ours.max() < 1e-6
    assert ours.max() < np.abs(plain / 1e6 - exact).max()


def test_cancelling_values_are_kept() -> None:
    """Adding 1 to 1e8 is lost in float32; the compensation holds it."""
    big, one = np.full((1, K), 1e8, np.float32), np.ones((1, K), np.float32)
    running = statistics.empty(K)
    for part in (big, one, one, -big):
        running = update(running, part)
    np.testing.assert_allclose(running.mean, 0.5)


def test_no_tokens_give_zeros() -> None:
    stats = update(statistics.empty(K), tokens(4), np.zeros(4, bool))
    assert int(stats.count) == 0
    assert not np.asarray(stats.mean).any() and not np.asarray(stats.absmax).any()


def test_a_sample_is_of_the_tokens_however_they_are_batched() -> None:
    x, mask = tokens(4, 40), np.arange(40) < np.array([[40], [31], [1], [12]])
    whole = from_activations(x, mask, samples=16)
    running = statistics.empty(K, samples=16)
    for part, kept in zip(x, mask, strict=True):
        running = update(running, part, kept)
    np.testing.assert_array_equal(running.sample, whole.sample)
    rows = {row.tobytes() for row in x[mask]}
    assert len({row.tobytes() for row in np.asarray(whole.sample)} & rows) == 16


def test_a_sample_is_even_over_the_tokens() -> None:
    """Of 4000 tokens 1000 are kept: about a quarter of each tenth of them (standard deviation 4.3 in 100)."""
    x = np.arange(4000, dtype=np.float32)[:, None]
    kept = np.asarray(from_activations(x, samples=1000).sample)[:, 0]
    counts = np.histogram(kept, bins=10, range=(0, 4000))[0]
    assert len(set(kept)) == 1000
    assert (abs(counts - 100) < 40).all()


def test_a_sample_of_few_tokens_ends_with_zeros() -> None:
    stats = statistics.merge(*(from_activations(x, samples=8) for x in tokens(2, 3)))
    assert (np.abs(np.asarray(stats.sample)).max(axis=1) > 0).tolist() == [True] * 6 + [False] * 2
