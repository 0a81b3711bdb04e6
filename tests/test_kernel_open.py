"""Kernels as CONTRIBUTING.md says how to add them: one that multiplies, one that learns tables, a row each."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import any4_jax as a4
from any4_jax import choice
from any4_jax.clustering import backends, kmeans, kmeans_1d
from any4_jax.methods import NF4, Int
from any4_jax.product import plan
from any4_jax.product.backends.base import Backend, arrays_of, why_no_codes
from any4_jax.weights import Operator, operator, product

M, N, K, G = 3, 10, 56, 16


def lut_sums(x: jax.Array, codes: jax.Array, lut: jax.Array, scales: jax.Array, offsets: jax.Array) -> jax.Array:
    """A kernel: plain arrays in, y [M, N] out. Each group's inputs are summed by code, then meet the table.

    Args:
      x: [M, K].
      codes: uint8 [N, K].
      lut: [N or 1, 8].
      scales, offsets: [N, ceil(K / G)].
    """
    f32, k = jnp.float32, x.shape[1]
    short = -k % G
    grouped = jnp.pad(x.astype(f32), ((0, 0), (0, short))).reshape(x.shape[0], -1, G)
    chosen = jax.nn.one_hot(jnp.pad(codes, ((0, 0), (0, short))), lut.shape[1]).reshape(codes.shape[0], -1, G, 8)
    by_code = jnp.einsum("mgi,ngic->mngc", grouped, chosen, precision="highest")
    by_group = jnp.einsum("mngc,nc->mng", by_code, jnp.broadcast_to(lut.astype(f32), (codes.shape[0], 8)))
    total = grouped.sum(axis=2)[:, None]
    return (by_group * scales.astype(f32) + total * offsets.astype(f32)).sum(axis=2).astype(x.dtype)


def _supports(x: Any, w: Any, platform: str) -> str | None:
    del platform
    if reason := why_no_codes(w):
        return reason
    if w.bits != 3 or w.group_size != G or w.offsets is None:
        return f"codes have {w.bits} bits in groups of {w.group_size}, it takes 3 in groups of {G}, with offsets"
    return None if x.dtype == jnp.float32 else f"x is {x.dtype}, it takes float32"


def _run(x: jax.Array, w: Any) -> jax.Array:
    arrays = arrays_of(w)
    return lut_sums(x, w.unpacked_codes(), arrays.lut, arrays.scales, arrays.offsets)


TOY = Backend(name="toy", supports=_supports, run=_run, detail=lambda x, w: "sums by code")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Puts TOY at the front of the table; gives the shapes of x that it is run for."""
    seen: list[tuple[int, ...]] = []

    def run(x: jax.Array, w: Any) -> jax.Array:
        seen.append(x.shape)
        return TOY.run(x, w)

    watched = Backend(name="toy", supports=_supports, run=run, detail=TOY.detail)
    monkeypatch.setattr(plan, "BACKENDS", choice.Choice((watched, *plan.BACKENDS.options)))
    return seen


def weight(method: Any) -> Any:
    return a4.quantize(jnp.asarray(np.random.default_rng(0).normal(size=(N, K)), jnp.float32), method)


def inputs(dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(M, K)), dtype)


def test_a_kernel_is_chosen_and_matches_xla(calls: list) -> None:
    x, w = inputs(), weight(Int(3, group_size=G))
    y = a4.matmul(x, w)
    assert calls == [(M, K)]
    np.testing.assert_allclose(y, a4.matmul(x, w, backend="xla"), rtol=1e-5, atol=1e-5)
    assert calls == [(M, K)], "backend='xla' runs XLA's"
    np.testing.assert_allclose(jax.jit(a4.matmul)(x, w), y, rtol=1e-6, atol=1e-6)
    identity = a4.matmul(jnp.eye(K), w, backend="toy").T
    np.testing.assert_allclose(identity, a4.dequantize(w), rtol=1e-6, atol=1e-6)


def test_a_kernel_is_explained(calls: list) -> None:
    first, *others = str(a4.explain(inputs(), weight(Int(3, group_size=G)))).splitlines()
    assert first == "toy: taken (sums by code)"
    assert "xla: could, but 'toy' comes first" in others
    refused = str(a4.explain(inputs(), weight(NF4(group_size=G)))).splitlines()[0]
    assert refused == f"toy: codes have 4 bits in groups of {G}, it takes 3 in groups of {G}, with offsets"
    assert calls == []


@operator()
class Jitted(Operator):
    """One whose product is a jitted function of its own."""

    inner: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape


@product.register
def _(w: Jitted, x, backend=None):
    return _jitted_product(w.inner, x)


@jax.jit
def _jitted_product(w, x):
    return product(w, x)


def test_what_is_traced_to_explain_is_never_run_nor_the_other_way_round() -> None:
    x, w = inputs(), weight(Int(4, group_size=G))
    words = a4.explain(x, w)
    assert a4.explain(x, Jitted(w)) == words
    np.testing.assert_array_equal(a4.matmul(x, Jitted(w)), a4.matmul(x, w))
    assert a4.explain(x, Jitted(w)) == words


def test_a_kernel_that_can_not_is_passed_over_or_refused_by_name(calls: list) -> None:
    four, three = weight(NF4(group_size=G)), weight(Int(3, group_size=G))
    assert a4.matmul(inputs(), four).shape == (M, N) and calls == []
    with pytest.raises(ValueError, match="'toy' can't do this: codes have 4 bits"):
        a4.matmul(inputs(), four, backend="toy")
    with pytest.raises(ValueError, match="'toy' can't do this: x is bfloat16"):
        a4.matmul(inputs(jnp.bfloat16), three, backend="toy")


def test_a_kernel_needs_no_derivative_of_its_own(calls: list) -> None:
    w = weight(Int(3, group_size=G))
    ours, truth = (
        jax.grad(lambda x, name=name: (a4.matmul(x, w, backend=name) ** 2).sum())(inputs()) for name in ("toy", "xla")
    )
    np.testing.assert_allclose(ours, truth, rtol=1e-4, atol=1e-4)
    assert calls


def plain_exact(rows, weights, tol, numbers, options) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A solver: optimal clusters of each row [K] in O(k K^2), as `any4_jax.clustering.xla.solve` gives them."""
    del tol, numbers
    weights = jnp.broadcast_to(1.0 if weights is None else weights, rows.shape)

    def one_row(row: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        order = jnp.argsort(row)
        x, w = row[order], weight[order]
        sums = [jnp.concatenate([jnp.zeros(1), jnp.cumsum(w * x**power)]) for power in range(3)]
        mass, first, second = (s[None, :] - s[:, None] for s in sums)
        cost = second - first**2 / jnp.where(mass > 0, mass, 1.0)  # of values i to j - 1 in one cluster
        cost = jnp.where(jnp.tri(len(x) + 1, k=0, dtype=bool), jnp.inf, cost)
        best, starts = cost[0], []
        for _ in range(options.k - 1):
            through = best[:, None] + cost
            starts.append(through.argmin(axis=0))
            best = through.min(axis=0)
        ends, centroids = jnp.array(len(x)), []
        for start in [*reversed(starts), jnp.zeros(len(x) + 1, int)]:
            centroids.append(first[start[ends], ends] / mass[start[ends], ends])
            ends = start[ends]
        table = jnp.stack(centroids[::-1])
        distance = jnp.abs(row[:, None] - table)
        return table, distance.argmin(axis=1).astype(jnp.uint8), (weight * distance.min(axis=1) ** 2).sum()

    return jax.vmap(one_row)(rows, weights)


def _solves(solver: str, platform: str) -> str | None:
    del platform
    return None if solver == "exact" else f"it has only the exact solver, got solver={solver!r}"


SOLVER = choice.Backend("toy", _solves, plain_exact)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Puts SOLVER at the front of the table; gives the shapes of rows that programs with it were traced for."""
    seen: list[tuple[int, ...]] = []

    def run(rows: Any, *operands: Any, **options: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        seen.append(rows.shape)
        return SOLVER.run(rows, *operands, **options)

    watched = choice.Backend("toy", _solves, run)
    for module in (backends, kmeans):
        monkeypatch.setattr(module, "BACKENDS", choice.Choice((watched, *backends.BACKENDS.options)))
    return seen


def test_a_solver_is_chosen_and_matches_xla(traced: list) -> None:
    rng = np.random.default_rng(2)
    rows, weights = rng.normal(size=(5, 23)).astype(np.float32), rng.uniform(0.1, 2, (5, 23)).astype(np.float32)
    chosen = kmeans_1d(rows, 4, sample_weight=weights)
    assert traced == [(5, 23)]
    truth = kmeans_1d(rows, 4, sample_weight=weights, backend="xla")
    assert traced == [(5, 23)], "backend='xla' runs XLA's"
    np.testing.assert_array_equal(chosen.codes, truth.codes)
    for ours, expected in ((chosen.centroids, truth.centroids), (chosen.inertia, truth.inertia)):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_solver_that_can_not_is_passed_over_or_refused_by_name(traced: list) -> None:
    rows = np.random.default_rng(3).normal(size=(2, 23)).astype(np.float32)
    assert kmeans_1d(rows, 4, solver="lloyd").centroids.shape == (2, 4) and traced == []
    with pytest.raises(ValueError, match="'toy' can't do this: it has only the exact solver"):
        kmeans_1d(rows, 4, solver="lloyd", backend="toy")
