"""Any4: its fields alone and together, what learned tables hold exactly, and that each part earns its place."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax import statistics, weights
from any4_jax.methods import NF4, Any4, Int, quantize
from any4_jax.methods.integer_tables import stored
from any4_jax.refit import Fit

N, K, G = 20, 32, 16
dequantize = jax.jit(weights.dequantize)

# Each compiled solver costs seconds, so that the tests share a few configurations and shapes.
FLOAT = dict(group_size=G, table_dtype="float32", scale_dtype="float32")
REFITTED = Any4(**FLOAT)
EXACT = Any4(**FLOAT, refit=False)
SHARED = Any4(bits=2, group_size=G, symmetric=True, per_row=False, refit=False)


def layer() -> np.ndarray:
    return np.random.default_rng(0).standard_t(3, (N, K)).astype(np.float32)


def inputs() -> np.ndarray:
    """Activations [T, K] whose channels differ a hundredfold in size."""
    rng = np.random.default_rng(1)
    return (rng.normal(0.3, 1, (400, K)) * 10.0 ** rng.uniform(-1, 1, K)).astype(np.float32)


@functools.cache
def stats() -> statistics.Gathered:
    return statistics.from_activations(inputs())


def seen() -> statistics.Moments:
    return stats()[statistics.Moments()]


def errors(method, given: statistics.Gathered | None = None) -> np.ndarray:
    """Each row's squared error weighted by E[x^2], float64 [N]."""
    return error_of(quantize(jnp.asarray(layer()), method, given or stats()))


def error_of(q: weights.QuantizedTensor) -> np.ndarray:
    """The same of a result."""
    gap = np.asarray(dequantize(q), np.float64) - layer()
    return (np.asarray(seen().second_moment, np.float64) * gap**2).sum(axis=1)


def test_below_nf4_and_int4_on_a_heavy_tailed_layer() -> None:
    learned = errors(EXACT).sum()
    for baseline in (NF4(group_size=G), Int(group_size=G), Int(group_size=G, zero_point="float")):
        assert learned < 0.8 * errors(baseline).sum()


def test_statistics_pay() -> None:
    assert errors(EXACT).sum() < 0.9 * errors(EXACT, statistics.from_activations(np.ones((1, K), np.float32))).sum()


def test_lloyd_is_not_below_the_exact_solver() -> None:
    best, other = errors(EXACT), errors(dataclasses.replace(EXACT, solver="lloyd", init="nf4"))
    assert (best <= other * (1 + 1e-5)).all()
    assert np.isfinite(other).all()


@pytest.mark.slow
@pytest.mark.parametrize("plain", [EXACT, SHARED], ids=["per row", "shared, symmetric, 2 bits"])
def test_refit_raises_no_rows_error(plain: Any4) -> None:
    before, after = errors(plain), errors(dataclasses.replace(plain, refit=True))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.99 * before.sum()


def test_integers_are_chosen_as_they_are_stored() -> None:
    """A table of int8 refitted as it is stored is better than one rounded afterwards, and groups scale to it."""
    method, w = dataclasses.replace(REFITTED, table_dtype="int8"), jnp.asarray(layer())
    q, exact = (quantize(w, each, stats()) for each in (method, REFITTED))
    assert q.lut.dtype == jnp.int8 and int(jnp.abs(q.lut).max()) <= 127

    @jax.jit
    def others(q, exact):
        afterwards = stored(Fit(exact.lut, exact.scales, exact.offsets), jnp.dtype(jnp.int8))
        fits = afterwards, Fit(q.lut, *method.scale_groups(w, seen().second_moment, q.lut))
        return [weights.encode(w, *fit, bits=4, group_size=G) for fit in fits]

    refitted, rounded, rescaled = (error_of(each).sum() for each in (q, *others(q, exact)))
    assert refitted < 0.9 * rounded
    assert rescaled < 1.2 * refitted


def test_a_rows_company_changes_no_bit() -> None:
    """20 rows alone, and among 50 others in front of them: another chunk, another place in it, another padding."""
    w, method = layer(), REFITTED
    alone = quantize(jnp.asarray(w), method, stats())
    others = np.random.default_rng(9).normal(size=(50, K)).astype(np.float32)
    among = quantize(jnp.asarray(np.concatenate([others, w])), method, stats())
    assert alone.shape == (N, K)
    for ours, theirs in zip(jax.tree.leaves(alone), jax.tree.leaves(among), strict=True):
        np.testing.assert_array_equal(ours, theirs[50:])


def test_chunk_size_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    w = jnp.asarray(layer())
    whole = quantize(w, REFITTED, stats())
    monkeypatch.setattr(sys.modules["any4_jax.methods.any4"], "_CHUNK_ROWS", 8)
    chunked = jax.jit(REFITTED.apply)(w, stats())
    for ours, theirs in zip(jax.tree.leaves(chunked), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_few_values_without_scaling_are_held_exactly() -> None:
    rng = np.random.default_rng(2)
    values = np.asarray(jnp.asarray(rng.normal(size=(N, 16)), jnp.bfloat16))
    w = np.take_along_axis(values, rng.integers(0, 16, (N, K)), axis=1)
    w[3] = w[3, 0]
    q = quantize(jnp.asarray(w), Any4(group_size=None))
    assert q.group_size == K
    np.testing.assert_array_equal(dequantize(q), w.astype(np.float32))


def test_few_values_in_groups_are_held_closely() -> None:
    """Every group holds the row's least and largest value, so all groups of a row share one scale."""
    rng = np.random.default_rng(3)
    values = np.sort(rng.normal(size=(N, 16)), axis=1).astype(np.float32)
    w = np.take_along_axis(values, rng.integers(0, 16, (N, K)), axis=1)
    w[:, ::G], w[:, 1::G] = values[:, :1], values[:, -1:]
    q = quantize(jnp.asarray(w), REFITTED, stats())
    np.testing.assert_allclose(dequantize(q), w, rtol=1e-5, atol=1e-5 * np.abs(w).max())


def test_a_matrix_beyond_the_bins_keeps_its_outliers() -> None:
    """The table of a large matrix is learned on means of neighbours; its ends are still those of the weights."""
    w = np.random.default_rng(6).normal(size=(300, 96)).astype(np.float32)
    w[17, 5] = 40.0
    fields = dict(bits=2, per_row=False, keep_outliers=True, bias_pow=0.5, solver="lloyd", init="quantile")
    q = quantize(jnp.asarray(w), Any4(group_size=None, table_dtype="float32", **fields))
    assert q.lut.shape == (1, 4)
    np.testing.assert_allclose(np.asarray(q.lut)[0, [0, -1]], [w.min(), 40.0], rtol=1e-6)


def test_row_order_leaves_a_shared_table_alone() -> None:
    """Equal weights of different importance: their order must not reach the sums."""
    w = np.round(layer() * 2) / 2
    order = np.random.default_rng(8).permutation(N)
    tables = [np.asarray(quantize(jnp.asarray(rows), SHARED, stats()).lut) for rows in (w, w[order])]
    np.testing.assert_array_equal(*tables)


@pytest.mark.slow
def test_the_seed_decides_random_starts() -> None:
    u = jnp.asarray(layer())
    fields = dict(bits=2, solver="lloyd", init="random", max_iter=1)
    tables = [Any4(**fields, seed=seed)._tables(u, jnp.ones_like(u), (u[:, 0], u[:, 0])) for seed in (0, 1)]
    assert (tables[0] != tables[1]).any()


def test_the_published_recipe() -> None:
    paper = Any4.paper()
    assert (paper.solver, paper.init, paper.sample_weight) == ("lloyd", "kmeans++", "abs_mean")
    assert (paper.scale_weighting, paper.sequential, paper.bits, paper.group_size) == (1, True, 4, 128)
    assert (
        not (paper.refit or paper.scale_search or paper.keep_outliers or paper.symmetric)
        and paper.bias_pow == 1.0
        and paper.per_row
    )
    assert Any4.paper(bits=3).bits == 3 and Any4.paper(bits=3).solver == "lloyd"


@pytest.mark.parametrize(
    "fields,given,expected",
    [
        ({}, True, lambda: seen().second_moment),
        ({}, False, lambda: np.ones(K)),
        ({"sample_weight": None}, True, lambda: np.ones(K)),
        ({"sample_weight": "mean_abs"}, True, lambda: seen().mean_abs),
        ({"sample_weight": "abs_mean"}, True, lambda: np.abs(seen().mean)),
    ],
)
def test_sample_weights_are_the_statistic_times_a_power_of_the_scale(fields, given: bool, expected) -> None:
    for power in (0, 1, 2):
        method = Any4(group_size=G, scale_weighting=power, **fields)
        importance = method._importance(stats() if given else None, K)
        np.testing.assert_allclose(importance, expected(), rtol=1e-6)
        _, weight, scales, _ = method._scaled(jnp.asarray(layer()), importance, G)
        by_weight = np.repeat(np.asarray(scales, np.float32), G, axis=1) ** power
        np.testing.assert_allclose(weight, np.asarray(expected()) * by_weight, rtol=1e-5)
