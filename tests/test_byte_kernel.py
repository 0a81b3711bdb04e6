"""The kernel contract of products of bytes: the numbers of the operator's own reference, on every instruction set that
this processor has."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from byte_weights import INSTRUCTION_SETS, KINDS, ULP, check, leaf, present, products, rounding, rows

from any4_jax import weights
from any4_jax.partition import combine, partition
from any4_jax.product import explain, matmul, matmul_each
from any4_jax.product.quantized_input import quantize_input
from any4_jax.weights import QuantizedTensor, QuantizeInput, Sum, take
from cuda_ffi import registration
from cuda_ffi.byte_product import TARGET
from cuda_ffi.threads import limit_threads

why_not = registration.why_not("cpu")
native = pytest.mark.skipif(why_not is not None, reason=str(why_not))

isa = pytest.fixture(params=INSTRUCTION_SETS, name="isa")(present)


def test_every_kind_of_weight_and_number_of_rows(isa: str) -> None:
    """K ends within a step, N within a tile; numbers of rows of x that all have code of their own."""
    ws = [leaf(7, 333, **{"g": 64, **fields}) for fields in KINDS.values()]
    check([rows(m, 333, dtype=list(ULP)[m % 3]) for m in (1, 2, 15)], ws, isa)


def test_every_group_size(isa: str) -> None:
    """Groups within a step and beyond it, such as end within one, a short last one, and one for the whole row."""
    sizes = [32, 64, 96, 128, 160, 256, 500, 1000]
    check([rows(m, 500) for m in (1, 4)], [leaf(3, 500, g=g, bits=bits) for g in sizes for bits in (4, 8)], isa)


@pytest.mark.parametrize("shape", [(1, 1, 1), (70, 3, 70), (90, 70, 33), (1, 9, 4100), (5, 70, 128), (3, 1, 2049)])
def test_shapes_beyond_one_pass(isa: str, shape: tuple[int, int, int]) -> None:
    """More rows of x than one pass takes, more of the weight than a task, and the smallest."""
    m, n, k = shape
    check([rows(m, k)], [leaf(n, k, g=64, bits=bits) for bits in (4, 8)], isa)


def test_inputs_at_the_ends_of_their_range(isa: str) -> None:
    """Ties go to even; groups of zeros, of the least and of the largest numbers stay finite."""
    ties = np.resize(np.arange(-4.5, 5.5), 64)
    x = jnp.asarray(np.stack([np.r_[127.0, ties[1:32], -127.0, ties[33:]], *np.ones((4, 64))]), jnp.float32)
    x = x.at[1].set(0).at[2, 32:].set(1e-40).at[3, 5].set(1e38).at[4, :32].set(-3e-30)
    check([x, x[:1]], [leaf(5, 64, g=32, offsets=False)], isa)


def test_threads_change_no_bit(isa: str) -> None:
    inputs, ws = [rows(m, 520) for m in (1, 40)], [leaf(300, 520)]
    try:
        limit_threads(1)
        alone = jax.block_until_ready(products(inputs, ws, isa))
        limit_threads(0)
        jax.tree.map(np.testing.assert_array_equal, products(inputs, ws, isa), alone)
    finally:
        limit_threads(0)


def test_values_that_are_not_finite_stay_in_their_rows(isa: str) -> None:
    ws = [leaf(4, 160, g=32, bits=bits) for bits in (4, 8)]
    broken = [
        dataclasses.replace(
            w,
            scales=w.scales.at[1, 2].set(jnp.inf).at[2, 0].set(jnp.nan),
            offsets=w.offsets.at[3, 4].set(jnp.nan),
        )
        for w in ws
    ]
    good = [rows(m, 160) for m in (1, 5)]
    for y in jax.tree.leaves(products(good, broken, isa)):
        assert np.isfinite(np.asarray(y[:, 0])).all() and not np.isfinite(np.asarray(y[:, 1:])).any()
    for bad in (jnp.nan, jnp.inf):
        for y in jax.tree.leaves(products([x.at[0, 5].set(bad) for x in good], ws, isa)):
            assert np.isnan(y[0]).all() and np.isfinite(np.asarray(y[1:])).all()


@native
def test_matmul_takes_it_and_agrees_with_xla() -> None:
    w, x = rounding(leaf(24, 200, g=64)), rows(2, 3, 200)
    assert "cpu: taken (x is rounded to bytes, which multiply the weight's bytes)" in explain(x, w, "cpu").splitlines()
    assert explain(x, w, "tpu").splitlines()[-1] == "xla: taken (x is rounded, and multiplies as floats)"
    y = matmul(x, w, "xla")
    for backend in (None, "cpu"):
        np.testing.assert_allclose(jax.jit(matmul, static_argnums=2)(x, w, backend), y, rtol=1e-5, atol=1e-4)
    text = jax.jit(matmul).lower(x, w).compile().as_text()
    assert text.count(f'custom_call_target="{TARGET}"') == 1
    assert "f32[24,200]" not in text and "f32[200,24]" not in text
    stack = jax.tree.map(lambda a: jnp.stack([a[::-1], a]), w)
    np.testing.assert_array_equal(jax.jit(lambda x, stack: matmul(x, take(stack, 1)))(x, stack), matmul(x, w))
    assert matmul(x[:0], w, "cpu").shape == (0, 3, 24)


@native
@pytest.mark.parametrize("how", [(), (8, False, "tensor")])
def test_several_weights_share_a_call(how: tuple[Any, ...]) -> None:
    leaves = leaf(24, 200), leaf(7, 200, ramp=0.5, seed=1), leaf(9, 200, row_tables=False)
    ws = tuple(rounding(w, *how) for w in leaves)
    x = rows(3, 200)
    lowered = jax.jit(matmul_each).lower(x, ws)
    assert lowered.as_text().count(f"@{TARGET}(") == 1
    for y, w in zip(lowered.compile()(x, ws), ws, strict=True):
        np.testing.assert_array_equal(y, matmul(x, w))
    mixed = (ws[0], rounding(leaf(24, 200), 7, True, "token"), ws[0].inner)
    assert jax.jit(matmul_each).lower(x, mixed).as_text().count(f"@{TARGET}(") == 2


@native
def test_gradients_are_those_of_xla() -> None:
    w, x = rounding(leaf(10, 90, g=32, dtype=jnp.float32)), rows(3, 90)
    tables, codes = partition(w)

    @jax.jit
    def slopes(x, tables):
        def loss(x, t, backend):
            return jnp.sin(matmul(x, combine(t, codes), backend)).sum()

        return [jax.tree.leaves(jax.grad(loss, (0, 1))(x, tables, backend)) for backend in ("cpu", "xla")]

    ours, theirs = slopes(x, tables)
    assert len(ours) == 3  # x, scales and offsets; a table of integers has none
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def floating(w: QuantizedTensor) -> QuantizedTensor:
    return dataclasses.replace(w, lut=w.lut.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "w, reason",
    [
        (
            rounding(floating(leaf(9, 80))),
            "the table is bfloat16 of 16 entries, it takes at most 16 of int8, or a ramp",
        ),
        (rounding(floating(leaf(9, 80)), 8, False, "token"), "the table is bfloat16 of 16 entries"),
        (rounding(leaf(9, 80, g=16)), "groups have 16 weights, it takes multiples of 32"),
        (rounding(leaf(9, 80, g=20), 8, True, "token"), "groups have 20 weights, it takes multiples of 8"),
        (rounding(Sum((leaf(9, 80), leaf(9, 80, seed=1)))), "the weight is a Sum"),
        (rounding(leaf(9, 80), 6), "for each group of inputs it takes x rounded to symmetric integers of 8 bits"),
        (dataclasses.replace(rounding(leaf(9, 80)), per="token", levels=jnp.linspace(-1, 1, 16)), "it takes integers"),
    ],
)
def test_what_it_cant_take_is_rounded_and_multiplied_as_floats(w: QuantizeInput, reason: str) -> None:
    x = rows(3, 80)
    line, *others = explain(x, w, "cpu").splitlines()
    assert line.startswith(f"inputs of {w.bits} bits: ") and line.endswith("; x is rounded, and multiplies as floats")
    assert reason in line and any(other.endswith(": taken") for other in others)
    expected = np.asarray(quantize_input(x, w), np.float64) @ np.asarray(weights.dequantize(w), np.float64).T
    np.testing.assert_allclose(matmul(x, w), expected, rtol=1e-4, atol=1e-4)
    short = matmul(x.astype(jnp.bfloat16), w)
    assert short.dtype == jnp.bfloat16
