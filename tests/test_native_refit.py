"""The C++ refit: every instruction set on every form of row, threads, vmap, the choice of a backend, life without it.

That it reaches what the other backends do, tests/test_refit.py asks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax.refit import Fit, backends, refit
from any4_jax.refit.scale_search import FITS, starts
from any4_jax.refit.xla import SETTLED
from cuda_ffi import refit as native
from cuda_ffi import registration

N = 12
# Short last groups, one group a row and its parts, fewer groups than lanes and more, groups of few weights.
CASES = {
    "default": {},
    "3 bits, inner entries": {"bits": 3, "free": (1, 7)},
    "2 bits, no offsets": {"bits": 2, "symmetric": True},
    "no offsets, a row a group": {"symmetric": True, "group_size": 72},
    "a row a group": {"group_size": 72},
    "three groups of parts": {"k": 40, "group_size": 16},
    "twenty groups": {"k": 315, "group_size": 16},
    "groups of 3": {"k": 50, "group_size": 3},
    "a shared table": {"free": (0, 0), "shared": True},
    "float16": {"dtype": jnp.float16},
    "float32": {"dtype": jnp.float32},
    "int8": {"table": jnp.int8},
    "int8, 2 bits, no offsets": {"table": jnp.int8, "bits": 2, "symmetric": True},
}


class Problem:
    """Rows with heavy tails and groups of different size, a constant row, an all-zero group, and a coarse start."""

    def __init__(
        self, bits=4, symmetric=False, group_size=32, k=72, dtype=jnp.bfloat16, free=None, shared=False, table=None
    ):
        rng = np.random.default_rng(0)
        groups = -(-k // group_size)
        self.group_size, self.free = group_size, free or (0, 2**bits)
        sizes = np.exp(rng.normal(0, 0.5, (N, groups))).repeat(group_size, axis=1)[:, :k]
        self.w = (0.3 + rng.standard_t(5, (N, k)) * sizes).astype(np.float32)
        self.w[3, :group_size] = 0
        self.w[4] = 0.3
        self.h = (10.0 ** rng.uniform(-2, 1, k)).astype(np.float32)
        filled = np.pad(self.w, ((0, 0), (0, -k % group_size)), mode="edge").reshape(N, groups, group_size)
        low, high = filled.min(axis=2), filled.max(axis=2)
        half = 2 ** (bits - 1)
        if symmetric:
            low, high = -np.maximum(-low, high), np.maximum(-low, high)
        scales = (np.maximum(high - low, 1e-6) / (2 * half - 1)).astype(dtype)
        offsets = (low + half * scales.astype(np.float32)).astype(dtype)
        levels = np.arange(-half, half) + rng.uniform(-0.2, 0.2, (1 if shared else N, 2 * half))
        if table == jnp.int8:
            levels, scales = (levels * 12).round(), (scales / 12).astype(dtype)
        self.start = Fit(levels.astype(table or dtype), scales, None if symmetric else offsets)

    def refit(self, isa: str = "auto", searches: int = 2, max_rounds: int = 300, **change) -> Fit:
        """By the handler, of arrays that may be given anew."""
        arrays = {"w": self.w, "importance": self.h, **self.start._asdict(), **change}
        settings = {"searches": searches, "max_rounds": max_rounds, "settled": SETTLED, "isa": isa}
        search = native.Search(starts(arrays["offsets"] is not None), FITS)
        found = native.refit(
            **{name: a if a is None else jnp.asarray(a) for name, a in arrays.items()},
            kind="cpu",
            group_size=self.group_size,
            free=self.free,
            search=search,
            **settings,
        )
        return Fit(*(a if a is None else np.asarray(a) for a in found))

    def expanded(self, per_group: np.ndarray | None) -> np.ndarray:
        """[N, K] in float64."""
        if per_group is None:
            return np.zeros(self.w.shape)
        return per_group.astype(np.float64).repeat(self.group_size, axis=1)[:, : self.w.shape[1]]

    def nearest(self, fit: Fit) -> np.ndarray:
        """The level of each weight, float64 [N, K]."""
        lut = np.broadcast_to(fit.lut.astype(np.float64), (N, fit.lut.shape[1]))
        levels = lut[:, None] * self.expanded(fit.scales)[..., None] + self.expanded(fit.offsets)[..., None]
        codes = np.abs(self.w[..., None] - levels).argmin(axis=2)
        return np.take_along_axis(lut, codes, axis=1)

    def error(self, fit: Fit) -> np.ndarray:
        """Each row's sum_k h_k (w_k - w^_k)^2 in float64."""
        gap = self.w - self.nearest(fit) * self.expanded(fit.scales) - self.expanded(fit.offsets)
        return (self.h * gap**2).sum(axis=1)


def same(found: Fit, expected: Fit) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("case", CASES)
def test_no_row_gets_worse_and_dtypes_stay(case, isa):
    problem = Problem(**CASES[case])
    found, start = problem.refit(isa), problem.start
    before, after = problem.error(start), problem.error(found)
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < 0.9 * before.sum()
    for mine, given in zip(found, start, strict=True):
        assert (mine is None) == (given is None)
        assert mine is None or (mine.dtype == given.dtype and mine.shape == given.shape)
    assert (np.diff(found.lut.astype(np.float32), axis=1) >= 0).all()
    held = [i for i in range(start.lut.shape[1]) if not problem.free[0] <= i < problem.free[1]]
    np.testing.assert_array_equal(found.lut[:, held], start.lut[:, held])
    # Of what is chosen among many starts, rounding may choose another that is as good.
    np.testing.assert_allclose(after.sum(), problem.error(problem.refit()).sum(), rtol=1e-2)


@pytest.mark.parametrize("case", ["default", "no offsets, a row a group", "twenty groups"])
def test_a_round_without_a_search_is_numpys(case, isa):
    """The table entry by entry, then scale and offset group by group, each by least squares in float64."""
    problem = Problem(**CASES[case] | {"dtype": jnp.float32})
    found = problem.refit(isa, searches=0, max_rounds=1)
    start, h, g = problem.start, problem.h.astype(np.float64), problem.group_size
    scales, offsets, levels = problem.expanded(start.scales), problem.expanded(start.offsets), problem.nearest(start)
    # Of constant weights nothing is left but rounding.
    rows = [row for row in range(N) if row not in (3, 4)]
    for row in rows:
        for entry, value in enumerate(start.lut[row]):
            used = levels[row] == value
            s, o = scales[row, used], offsets[row, used]
            mass = (h[used] * s * s).sum()
            best = (h[used] * s * (problem.w[row, used] - o)).sum() / mass if mass > 0 else value
            np.testing.assert_allclose(found.lut[row, entry], best, rtol=1e-4, atol=1e-5)
    levels = problem.nearest(start._replace(lut=found.lut))
    for row in rows:
        for group in range(start.scales.shape[1]):
            part = slice(group * g, (group + 1) * g)
            t, weight = levels[row, part], np.sqrt(h[part])
            columns = np.stack([t] if start.offsets is None else [t, np.ones_like(t)], axis=1)
            best = np.linalg.lstsq(columns * weight[:, None], problem.w[row, part] * weight, rcond=None)[0]
            np.testing.assert_allclose(found.scales[row, group], best[0], rtol=1e-4)
            if found.offsets is not None:
                np.testing.assert_allclose(found.offsets[row, group], best[1], rtol=1e-3, atol=1e-4)


def test_threads_and_company_change_no_bit(isa, one_thread, library):
    problem = Problem()
    alone = problem.refit(isa)
    library.any4_cpu_limit_threads(2)
    same(problem.refit(isa), alone)
    part = slice(7, 8)
    one = problem.refit(isa, w=problem.w[part], **{n: a[part] for n, a in problem.start._asdict().items()})
    same(one, Fit(*(a[part] for a in alone)))


def test_powers_of_two_change_no_bit(isa):
    problem = Problem()
    found, factor = problem.refit(isa), np.float32(2.0**-20)
    start = {n: (getattr(problem.start, n).astype(np.float32) * factor).astype(jnp.bfloat16) for n in Fit._fields[1:]}
    scaled = problem.refit(isa, w=problem.w * factor, **start)
    np.testing.assert_array_equal(scaled.lut, found.lut)
    for mine, theirs in zip(scaled[1:], found[1:], strict=True):
        np.testing.assert_array_equal(mine.astype(np.float32), theirs.astype(np.float32) * factor)


def test_groups_without_importance_stay(isa):
    problem = Problem()
    problem.h[32:64] = 0
    found, start = problem.refit(isa), problem.start
    np.testing.assert_array_equal(found.scales[:, 1], start.scales[:, 1])
    np.testing.assert_array_equal(found.offsets[:, 1], start.offsets[:, 1])
    assert problem.error(found).sum() < 0.9 * problem.error(start).sum()
    problem.h[:] = 0
    same(problem.refit(isa), start)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_spoils_its_own_row_alone(value, isa):
    problem = Problem()
    whole = problem.refit(isa)
    problem.w[5, 40] = value
    spoilt = problem.refit(isa)
    for mine, theirs, given in zip(spoilt, whole, problem.start, strict=True):
        np.testing.assert_array_equal(mine[5], given[5])
        np.testing.assert_array_equal(np.delete(mine, 5, axis=0), np.delete(theirs, 5, axis=0))


@pytest.mark.parametrize("over", ["rows", "importance"])
def test_vmap(over, library):
    problem = Problem()
    whole = problem.refit()

    def call(w, h, fit):
        return refit(w, h, fit, 32, searches=2, max_rounds=300, backend="cpu")

    if over == "rows":
        stacked = jax.tree.map(lambda a: jnp.asarray(a).reshape(3, 4, -1), (problem.w, problem.start))
        batched = jax.jit(jax.vmap(call, in_axes=(0, None, 0)))
        operands = (stacked[0], problem.h, stacked[1])
        assert batched.lower(*operands).as_text().count("@any4_cpu_refit") == 1
        same(Fit(*(np.asarray(a).reshape(N, -1) for a in batched(*operands))), whole)
    else:
        start = jax.tree.map(jnp.asarray, problem.start)
        found = jax.vmap(call, in_axes=(None, 0, None))(problem.w, np.stack([problem.h, 0 * problem.h]), start)
        same(Fit(*(np.asarray(a)[0] for a in found)), whole)
        same(Fit(*(np.asarray(a)[1] for a in found)), problem.start)


def lowered(rows: int, platform: str) -> str:
    problem = Problem()
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype), (problem.w, problem.start))
    call = jax.jit(lambda w, h, fit: refit(w, h, fit, 32, searches=0, max_rounds=1))
    return call.trace(shapes[0], problem.h, shapes[1]).lower(lowering_platforms=(platform,)).as_text()


def test_the_platform_decides_where_the_program_is_lowered(library):
    assert "any4_cpu_refit" in lowered(2, "cpu")
    assert "any4_cpu_refit" not in lowered(2, "cuda")


def test_without_a_library(monkeypatch):
    monkeypatch.setattr(registration, "_register", lambda kind: f"no {kind} library is built")
    # Of a shape of its own: what was traced with a library stays as it was.
    assert "any4_cpu_refit" not in lowered(3, "cpu")
    problem = Problem()
    with pytest.raises(ValueError, match="no cpu library is built"):
        refit(jnp.asarray(problem.w), problem.h, problem.start, 32, searches=0, max_rounds=1, backend="cpu")
    with pytest.raises(RuntimeError, match="no cpu library is built"):
        problem.refit()


def test_a_backend_that_there_is_not_or_that_runs_elsewhere_is_refused():
    problem = Problem()
    with pytest.raises(ValueError, match="backend='fast', need one of .*'xla'"):
        refit(jnp.asarray(problem.w), problem.h, problem.start, 32, searches=0, max_rounds=1, backend="fast")
    assert backends.BACKENDS.named("cpu").supports("cuda") == "it runs on cpu, not on cuda"


def test_an_empty_batch(library):
    problem = Problem()
    none = {"w": problem.w[:0], **{n: a[:0] for n, a in problem.start._asdict().items()}}
    assert [a.shape for a in problem.refit(**none)] == [(0, 16), (0, 3), (0, 3)]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"isa": "sse9"}, "isa=sse9"),
        ({"importance": np.ones(3, np.float32)}, "shapes"),
        ({"scales": np.ones((N, 2), np.float32)}, "shapes"),
        ({"lut": np.zeros((N, 17), np.float32)}, "out of range"),
    ],
)
def test_the_handler_refuses(change, words, library):
    with pytest.raises(Exception, match=words):
        Problem().refit(**change)
