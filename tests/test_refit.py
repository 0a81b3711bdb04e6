"""The refit on stored dtypes: it never raises a row's error, each part lowers it, what it may not change it leaves.

What else the C++ backend must do, tests/test_native_refit.py asks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax import statistics, weights
from any4_jax.choice import default_platform
from any4_jax.methods import Any4, quantize
from any4_jax.refit import Fit, backends, refit
from any4_jax.refit.groups import Groups, cells_of, errors, errors_from, least_squares, levels_of, moments_of
from any4_jax.refit.scale_search import search_scales

N, K, G = 24, 72, 32
# One shape and few configurations: each compiles for seconds.
PLAIN = Any4(group_size=G, refit=False)


def layer() -> np.ndarray:
    """Rows as a trained layer has them: heavy tails, groups of different size, and one with an all-zero group."""
    rng = np.random.default_rng(0)
    w = rng.standard_t(5, (N, K)) * np.exp(rng.normal(0, 0.5, (N, 3)).repeat(G, axis=1)[:, :K])
    w[3, :G] = 0
    return w.astype(np.float32)


def inputs() -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.normal(0.3, 10.0 ** rng.uniform(-1, 0.5, K), (256, K)).astype(np.float32)


W = layer()


@functools.cache
def stats() -> statistics.Gathered:
    return statistics.from_activations(inputs())


def importance() -> jax.Array:
    return stats()[statistics.Moments()].second_moment


def stored_error(q: weights.QuantizedTensor) -> np.ndarray:
    """Each row's error sum_k h_k (w_k - w^_k)^2 in float64, from the stored arrays alone: [N]."""
    back = np.take_along_axis(np.asarray(q.lut, np.float64), np.asarray(q.unpacked_codes(), np.int64), axis=1)
    for stored, combine in ((q.scales, np.multiply), (q.offsets, np.add)):
        if stored is not None:
            back = combine(back, np.asarray(stored, np.float64).repeat(G, axis=1)[:, :K])
    return (np.asarray(importance(), np.float64) * (back - W) ** 2).sum(axis=1)


def learned(method: Any4) -> weights.QuantizedTensor:
    return quantize(jnp.asarray(W), method, stats())


@pytest.fixture(params=[option.name for option in backends.BACKENDS.options])
def backend(request) -> str:
    """Each of the refit's backends that works here."""
    reason = backends.BACKENDS.named(request.param).supports(default_platform())
    if reason is not None:
        pytest.skip(reason)
    return request.param


@functools.cache
def start() -> weights.QuantizedTensor:
    return learned(PLAIN)


def rounds(number: int, w: jax.Array, backend: str) -> Fit:
    fit = Fit(start().lut, start().scales, start().offsets)
    return refit(w, importance(), fit, G, searches=1, max_rounds=number, backend=backend)


def test_no_round_raises_a_rows_error(backend) -> None:
    before = [stored_error(start())]
    for number in (1, 3):
        fit = rounds(number, jnp.asarray(W), backend)
        before.append(stored_error(weights.encode(jnp.asarray(W), *fit, bits=4, group_size=G)))
        assert (before[-1] <= before[-2] * (1 + 1e-6)).all()
    assert before[1].sum() < 0.95 * before[0].sum()


def test_each_part_lowers_the_error() -> None:
    parts = (PLAIN, dataclasses.replace(PLAIN, refit=True, scale_search=0), Any4(group_size=G))
    exact, refitted, searched = (stored_error(learned(method)).sum() for method in parts)
    assert refitted < 0.95 * exact
    assert searched < 0.97 * refitted


@pytest.mark.parametrize("fields", [{}, {"refit": False}], ids=["default", "exact tables alone"])
def test_every_row_is_below_the_published_recipe(fields) -> None:
    ours, paper = (stored_error(learned(method)) for method in (Any4(group_size=G, **fields), Any4.paper(group_size=G)))
    # bfloat16 tables: rounding may cost an optimal one more than another, by 2^-9 of a step.
    assert (ours <= paper * (1 + 1e-3)).all()
    assert ours.sum() < 0.9 * paper.sum()


def test_a_refit_goes_nowhere_from_what_is_exact(backend) -> None:
    """All weights are on the stored table already: no error, nothing to win, nothing changes."""
    fit = rounds(3, weights.dequantize(start()), backend)
    for ours, theirs in zip(fit, (start().lut, start().scales, start().offsets), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_ends_of_a_table_may_be_held(backend) -> None:
    fit = Fit(start().lut, start().scales, start().offsets)
    options = {"searches": 0, "max_rounds": 2, "entries": slice(1, -1)}
    held = refit(jnp.asarray(W), importance(), fit, G, **options, backend=backend)
    np.testing.assert_array_equal(held.lut[:, [0, -1]], start().lut[:, [0, -1]])
    assert (np.asarray(held.lut) != np.asarray(start().lut)).any()


@pytest.mark.parametrize("backend", [option.name for option in backends.BACKENDS.options[:-1]], indirect=True)
@pytest.mark.parametrize(
    "fields",
    [{}, {"bits": 3, "symmetric": True, "scale_dtype": "float16"}, {"bits": 2, "table_dtype": "int8"}],
    ids=["4", "3", "int8"],
)
def test_backends_agree(fields, backend) -> None:
    """In what they reach: float32 rounding may choose another of two scales that are as good."""
    begun = learned(dataclasses.replace(PLAIN, **fields))
    fit = Fit(begun.lut, begun.scales, begun.offsets)
    bits = fields.get("bits", 4)
    reached = []
    for name in ("xla", backend):
        found = refit(jnp.asarray(W), importance(), fit, G, searches=1, max_rounds=3, backend=name)
        reached.append(stored_error(weights.encode(jnp.asarray(W), *found, bits=bits, group_size=G)))
    assert (np.abs(reached[1] / reached[0] - 1) < 1e-3).mean() > 0.9
    np.testing.assert_allclose(reached[1].sum(), reached[0].sum(), rtol=1e-3)


@pytest.mark.parametrize("offsets", [True, False], ids=["with offsets", "without"])
def test_least_squares_of_a_group_is_numpys(offsets: bool) -> None:
    w = jnp.asarray(W)
    cells = cells_of(w, importance(), G)
    table = jnp.linspace(-7, 7, 16)[:, None].repeat(N, axis=1)
    start = Groups(jnp.full((3, N), 0.4), jnp.zeros((3, N)) if offsets else None)
    levels = levels_of(cells, table, start)
    moments = moments_of(cells, levels)
    found = least_squares(cells, moments, start)
    np.testing.assert_allclose(errors_from(cells, moments, found), errors(cells, levels, found), rtol=1e-3, atol=1e-4)
    for group, row in ((0, 5), (1, 7), (2, 11)):
        weight = np.sqrt(np.asarray(cells.h, np.float64)[:, group, 0])
        t = np.asarray(levels, np.float64)[:, group, row]
        columns = np.stack([t, np.ones(G)] if offsets else [t], axis=1)
        target = np.asarray(cells.w, np.float64)[:, group, row]
        best = np.linalg.lstsq(columns * weight[:, None], target * weight, rcond=None)[0]
        ours = [found.scales[group, row]] + ([found.offsets[group, row]] if offsets else [])
        np.testing.assert_allclose(np.asarray(ours), best, rtol=2e-3, atol=1e-4)


def test_the_search_finds_a_scale_that_is_far_off() -> None:
    """Weights on an int4 grid, and a start whose steps are a fifth too long: least squares alone stays there."""
    rng = np.random.default_rng(4)
    codes = rng.integers(-8, 8, (N, 64))
    codes[:, :2] = -8, 7
    w = jnp.asarray(codes * 0.5, jnp.float32)
    cells = cells_of(w, jnp.ones(64), 64)
    table = jnp.arange(-8.0, 8.0)[:, None].repeat(N, axis=1)
    start = Groups(jnp.full((1, N), 0.625), jnp.zeros((1, N)))
    found = search_scales(cells, table, start)
    np.testing.assert_allclose(found.scales, 0.5, rtol=1e-5)
    np.testing.assert_allclose(found.offsets, 0.0, atol=1e-5)
