"""The CUDA refit: on a GPU errors in float64 beside the start's and xla's, elsewhere lowering and words."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax import scaling, weights
from any4_jax.refit import Fit, backends, refit
from cuda_ffi import refit as native_refit
from cuda_ffi import registration

TARGET = native_refit.TARGETS["cuda"]
why_not = registration.why_not("cuda")
native = pytest.mark.skipif(why_not is not None, reason=str(why_not))
gpu = pytest.mark.skipif(jax.default_backend() != "gpu" or why_not is not None, reason="needs an NVIDIA GPU")

N, K = 40, 300


def layer(n: int = N, k: int = K) -> tuple[np.ndarray, np.ndarray]:
    """Rows with heavy tails and inputs of different importance; a row is constant, a stretch of another is zero, and
    some inputs count for nothing."""
    rng = np.random.default_rng(0)
    w = rng.standard_t(5, (n, k)) * np.exp(rng.normal(0, 0.5, (n, 1)))
    w[1] = 0.3
    w[3, : k // 2] = 0
    importance = 10.0 ** rng.uniform(-2, 1, k)
    importance[::17] = 0
    return w.astype(np.float32), importance.astype(np.float32)


def start_of(w: np.ndarray, g: int, bits: int, *, offsets: bool, table: Any, scale: Any) -> Fit:
    """An even table for each row."""
    rule = "asymmetric" if offsets else "symmetric"
    scales, found = scaling.group_scales(jnp.asarray(w), g, rule=rule, bits=bits, dtype=jnp.dtype(scale))
    half = 2 ** (bits - 1)
    lut = jnp.broadcast_to(jnp.arange(-half, half, dtype=table), (w.shape[0], 2 * half))
    return Fit(lut, scales, found)


def stored_error(w: np.ndarray, importance: np.ndarray, fit: Fit, g: int, bits: int) -> np.ndarray:
    """Each row's error in float64, from the stored arrays alone: [N]."""
    q = weights.encode(jnp.asarray(w), *fit, bits=bits, group_size=g)
    back = np.take_along_axis(np.asarray(q.lut, np.float64), np.asarray(q.unpacked_codes(), np.int64), axis=1)
    for stored, combine in ((fit.scales, np.multiply), (fit.offsets, np.add)):
        if stored is not None:
            back = combine(back, np.asarray(stored, np.float64).repeat(g, axis=1)[:, : w.shape[1]])
    return (importance.astype(np.float64) * (back - w) ** 2).sum(axis=1)


CASES = [
    dict(g=128, bits=4),
    dict(g=32, bits=4),
    dict(g=100, bits=3),
    dict(g=7, bits=2),
    dict(g=K, bits=4),
    dict(g=64, bits=4, offsets=False),
    dict(g=64, bits=4, table="float32", scale="float32"),
    dict(g=64, bits=4, table="float16", scale="float16"),
    dict(g=64, bits=3, table="bfloat16", scale="float32"),
]


@gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(f"{k}={v}" for k, v in case.items()))
def test_errors_fall_as_far_as_xlas(case: dict[str, Any]) -> None:
    case = dict(offsets=True, table="bfloat16", scale="bfloat16") | case
    g, bits = case.pop("g"), case.pop("bits")
    w, importance = layer()
    start = start_of(w, g, bits, **case)
    before = stored_error(w, importance, start, g, bits)
    found = {}
    for backend in ("cuda", "xla"):
        fit = refit(jnp.asarray(w), jnp.asarray(importance), start, g, searches=2, max_rounds=50, backend=backend)
        assert [a.dtype for a in jax.tree.leaves(fit)] == [a.dtype for a in jax.tree.leaves(start)]
        assert (np.diff(np.asarray(fit.lut, np.float32), axis=1) >= 0).all()
        found[backend] = stored_error(w, importance, fit, g, bits)
    assert (found["cuda"] <= before * (1 + 1e-6) + 1e-12).all()
    # Rounding may choose another of scales that are as good, and the rounds after differ.
    np.testing.assert_allclose(found["cuda"].sum(), found["xla"].sum(), rtol=0.01)
    assert found["cuda"].sum() < 0.9 * before.sum()


@gpu
def test_rounds_never_raise_a_rows_error() -> None:
    w, importance = layer()
    fit = start_of(w, 64, 4, offsets=True, table="bfloat16", scale="bfloat16")
    errors = [stored_error(w, importance, fit, 64, 4)]
    for rounds in (1, 2, 3, 6, 20):
        after = refit(jnp.asarray(w), jnp.asarray(importance), fit, 64, searches=1, max_rounds=rounds, backend="cuda")
        errors.append(stored_error(w, importance, after, 64, 4))
        assert (errors[-1] <= errors[-2] * (1 + 1e-6) + 1e-12).all()


@gpu
def test_what_may_not_change_stays() -> None:
    w, importance = layer()
    start = start_of(w, 64, 4, offsets=True, table="bfloat16", scale="bfloat16")
    run = functools.partial(refit, jnp.asarray(w), jnp.asarray(importance), start, 64, max_rounds=9, backend="cuda")
    held = run(searches=1, entries=slice(1, -1))
    np.testing.assert_array_equal(held.lut[:, [0, -1]], start.lut[:, [0, -1]])
    assert (held.lut != start.lut).any()
    np.testing.assert_array_equal(run(searches=1, entries=slice(0)).lut, start.lut)
    exact = weights.dequantize(weights.encode(jnp.asarray(w), *start, bits=4, group_size=64))
    same = refit(exact, jnp.asarray(importance), start, 64, searches=2, max_rounds=9, backend="cuda")
    for ours, theirs in zip(same, start, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@gpu
def test_company_and_powers_of_two_change_no_bit() -> None:
    w, importance = layer()
    many = np.tile(w, (60, 1))
    start = start_of(many, 64, 4, offsets=True, table="bfloat16", scale="bfloat16")
    options: dict[str, Any] = dict(searches=2, max_rounds=50, backend="cuda")
    whole = refit(jnp.asarray(many), jnp.asarray(importance), start, 64, **options)
    first = jax.tree.map(lambda a: a[:N], start)
    alone = refit(jnp.asarray(w), jnp.asarray(importance), first, 64, **options)
    for ours, theirs in zip(whole, alone, strict=True):
        np.testing.assert_array_equal(ours, np.tile(np.asarray(theirs), (60, 1)))
    larger = Fit(first.lut, first.scales * 2.0**9, first.offsets * 2.0**9)
    scaled = refit(jnp.asarray(w) * 2.0**9, jnp.asarray(importance), larger, 64, **options)
    np.testing.assert_array_equal(scaled.lut, alone.lut)
    np.testing.assert_array_equal(scaled.scales, alone.scales * 2.0**9)
    np.testing.assert_array_equal(scaled.offsets, alone.offsets * 2.0**9)


@gpu
def test_what_is_not_finite_stays_in_its_row() -> None:
    w, importance = layer()
    start = start_of(w, 64, 4, offsets=True, table="bfloat16", scale="bfloat16")
    bad = w.copy()
    bad[2, 5] = np.nan
    clean, spoilt = (
        refit(jnp.asarray(a), jnp.asarray(importance), start, 64, searches=1, max_rounds=9, backend="cuda")
        for a in (w, bad)
    )
    for found, good, given in zip(spoilt, clean, start, strict=True):
        np.testing.assert_array_equal(np.delete(found, 2, 0), np.delete(good, 2, 0))
        np.testing.assert_array_equal(found[2], given[2])


def lowered(function, *arguments) -> str:
    """StableHLO for an NVIDIA GPU, which this machine needn't have."""
    checks = [jax.export.DisabledSafetyCheck.custom_call(TARGET)]
    return jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(*arguments).mlir_module()


@native
def test_it_is_lowered_to_one_call() -> None:
    w, importance = layer()
    start = start_of(w, 64, 4, offsets=True, table="bfloat16", scale="bfloat16")
    text = lowered(lambda w, h, fit: refit(w, h, fit, 64, searches=2, max_rounds=300), w, importance, start)
    assert text.count(f"@{TARGET}(") == 1 and "stablehlo.while" not in text


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_what_it_declines_it_says(platform: str) -> None:
    assert backends.BACKENDS.named("cuda").supports(platform) == f"it runs on cuda, not on {platform}"


def test_without_the_library_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_register", lambda kind: f"no {kind} library is built")
    assert backends.BACKENDS.named("cuda").supports("cuda") == "no cuda library is built"
