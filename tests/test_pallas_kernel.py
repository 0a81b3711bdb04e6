"""The Pallas products: on any machine Triton's kernels in jax's interpreter against the float64 truth, on a GPU the
kernel contract. test_pallas_choice.py has which kernel is taken, and lowers every one.

The interpreter can run neither byte permutation in assembly nor `wgmma` with an operand in registers: that the assembly
decodes right (triton_lookup.permuted, all of mosaic_registers) only the runs on a GPU show.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import kernel_contract
import numpy as np
import pytest
from kernel_contract import CASES, HALVES, ULP, Case, leaf, rows, within

import any4_jax as a4
from any4_jax.product import explain, matmul
from any4_jax.weights import QuantizedTensor
from pallas_kernels import mosaic_narrow, mosaic_wide, triton_dequantize, triton_gemm, triton_gemv
from pallas_kernels.choice import Choice, Problem, choose
from pallas_kernels.device import gpu_name
from pallas_kernels.lut_product import lut_product

gpu = pytest.mark.skipif(gpu_name() is None, reason="needs an NVIDIA GPU")
on_hopper = pytest.mark.skipif("H100" not in str(gpu_name()), reason="needs a Hopper GPU")

# One ulp is rounding of the result; x in float32 leaves room for sums alone.
UNIT = {**ULP, "float32": 2.0**-23}
SMALL = {
    "triton_gemv": triton_gemv.Config(columns=64),
    "triton_gemm": triton_gemm.Config(rows=16, split=2),
    "triton_dequantize": triton_dequantize.Config(columns=64),
    "mosaic_narrow": mosaic_narrow.Config(8, warpgroups=2, stages=2),
    "mosaic_wide": mosaic_wide.Config(columns=64, stages=2),
}
# What the other family does in XLA.
IN_FLOAT32 = tuple(
    Case(m, 37, 352, dict(bits=bits, **fields), "float32")
    for bits in (2, 3, 4, 8)
    for m, fields in ((1, dict()), (3, dict(g=32, offsets=False)), (33, dict(g=32, lut=jnp.float32)), (200, dict()))
)


def product(x: jax.Array, w: QuantizedTensor, chosen: Choice | None = None, interpret: bool = False) -> jax.Array:
    codes = w.codes if isinstance(w.codes, tuple) else (w.codes,)
    fields = dict(bits=w.bits, group_size=w.group_size)
    return lut_product(x, codes, w.lut, w.scales, w.offsets, **fields, choice=chosen, interpret=interpret)


def forced(kernel: str, **fields: Any) -> Choice:
    return Choice(kernel, dataclasses.replace(SMALL[kernel], **fields), "asked for by this test")


def problem(x: Any, w: QuantizedTensor, name: str) -> Problem:
    offsets = None if w.offsets is None else w.offsets.dtype
    n, k = w.shape
    return Problem(n, k, x.shape[0], w.bits, w.group_size, x.dtype, w.lut.dtype, w.scales.dtype, offsets, name)


def check(y: jax.Array, x: jax.Array, w: QuantizedTensor, kernel: str = "") -> None:
    """Of the kernel that is chosen here, or the one named."""
    kernel = kernel or choose(problem(x, w, gpu_name() or "")).kernel
    unit = UNIT[str(x.dtype)]
    within(y, x, w, unit, of_weights=0.0 if kernel.startswith("triton_gem") else 2 * unit)


# M, N, K, what `leaf` takes, dtype of x
INTERPRETED = [
    ("triton_gemv", 3, 9, 301, dict(g=128), "bfloat16"),
    ("triton_dequantize", 2, 5, 75, dict(bits=3, g=32, scale=jnp.uint8, row_tables=False, offsets=False), "float32"),
    ("triton_gemm", 17, 19, 333, dict(g=64), "bfloat16"),
]


@pytest.mark.parametrize(("kernel", "m", "n", "k", "fields", "dtype"), INTERPRETED, ids=lambda v: str(v)[:20])
def test_interpreted_kernels_are_right(kernel: str, m: int, n: int, k: int, fields: dict[str, Any], dtype: str) -> None:
    """Odd sizes, a short last group, rows of W and of x beyond the last of a tile, several turns."""
    w, x = leaf(n, k, **fields), rows(m, k, dtype=dtype)
    more = dict(rows_of_x=2) if kernel == "triton_gemv" and m > 1 else {}
    check(jax.jit(lambda x, w: product(x, w, forced(kernel, **more), True))(x, w), x, w, kernel)


@gpu
@pytest.mark.parametrize("name", [*CASES, "float32"])
def test_the_contract(name: str) -> None:
    for case in CASES.get(name, IN_FLOAT32):
        x, w = case.operands()
        check(product(x, w), x, w)


@on_hopper
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kernel", ["mosaic_narrow", "mosaic_wide"])
@pytest.mark.parametrize("fields", [dict(), dict(offsets=False, row_tables=False), dict(g=32), dict(g=64), dict(g=256)])
def test_the_kernels_on_wgmma(kernel: str, dtype: str, fields: dict[str, Any]) -> None:
    """One step and many, idle warpgroups, several blocks, tiles of x that are whole or not; by name, since matrices for
    which mosaic_wide is chosen are too large for a test."""
    counts = (1, 9, 30, 64) if kernel == "mosaic_narrow" else (8, 130, 520)
    for (n, k), m in itertools.product(((128, 128), (384, 1280)), counts):
        w, x = leaf(n, k, lut=dtype, scale=dtype, **fields), rows(m, k, dtype=dtype)
        columns = max(8, -(-m // 8) * 8) if kernel == "mosaic_narrow" else 256 if m > 128 else 64
        stages = 2 if columns > 32 else 4
        more = dict(warpgroups=4) if kernel == "mosaic_narrow" and k > 128 else {}
        check(product(x, w, forced(kernel, columns=columns, stages=stages, **more)), x, w, kernel)


@gpu
@pytest.mark.parametrize("m", [1, 7, 20])
def test_triton_multiplies_what_wgmma_would(m: int) -> None:
    """The kernels that other GPUs take, on this one."""
    w, x = leaf(200, 1152), rows(m, 1152)
    for kernel in ("triton_gemv", "triton_gemm"):
        check(product(x, w, forced(kernel)), x, w, kernel)


@gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", HALVES)
def test_identity_gives_the_weights_within_one_ulp(bits: int, dtype: str) -> None:
    w = leaf(64, 256, bits=bits, lut=dtype, scale=dtype)
    kernel_contract.identity_gives_the_weights_within_one_ulp(product, w, dtype)


@gpu
def test_results_are_the_same_every_time() -> None:
    kernel_contract.results_are_the_same_every_time(product, (1, 8, 30, 300))


@gpu
def test_values_that_are_not_finite_stay_in_their_rows() -> None:
    kernel_contract.values_that_are_not_finite_stay_in_their_rows(product)


@gpu
def test_more_weights_than_31_bits_count() -> None:
    # The kernel that the whole weight takes, and not its last rows by themselves.
    kernel_contract.more_weights_than_31_bits_count(product, lambda y, x, w: check(y, x, w, "mosaic_narrow"))


@gpu
def test_the_whole_result_is_written() -> None:
    kernel_contract.the_whole_result_is_written(product, check)


@on_hopper
def test_the_whole_result_of_many_rows_is_written() -> None:
    """Several blocks after each other on a multiprocessor, and rows of x behind the last tile."""
    run = lambda x, w: product(x, w, forced("mosaic_wide", columns=256))  # noqa: E731
    kernel_contract.the_whole_result_is_written(
        run, lambda y, x, w: check(y, x, w, "mosaic_wide"), (leaf(8192, 512),), (530, 1024)
    )


@gpu
def test_gradients_equal_those_of_xla() -> None:
    kernel_contract.gradients_equal_those_of_xla("pallas")


@gpu
def test_matmul_takes_it_and_agrees_with_xla() -> None:
    w = leaf(128, 512)
    for x in (rows(1, 512), rows(2, 3, 512)):
        assert "pallas: taken" in explain(x, w) or "pallas: could" in explain(x, w)
        y, truth = (np.asarray(jax.jit(matmul, static_argnums=2)(x, w, name), np.float32) for name in ("pallas", "xla"))
        np.testing.assert_allclose(y, truth, rtol=0.02, atol=0.5)
        text = jax.jit(matmul, static_argnums=2).lower(x, w, "pallas").compile().as_text()
        assert "[128,512]" not in text and "[512,128]" not in text
    assert matmul(x[:0], w, "pallas").shape == (0, 3, 128)


@gpu
def test_scan_over_layers() -> None:
    """A layer is sliced out of its stack, and multiplied by the same kernel as a matrix by itself."""
    layers = [leaf(256, 256, seed=seed) for seed in range(3)]
    stack, x = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers), rows(2, 256)

    @jax.jit
    def loop(x, stack):
        return jax.lax.scan(lambda x, i: (matmul(x, a4.take(stack, i), "pallas") / 64, None), x, jnp.arange(3))[0]

    each = x
    for w in layers:
        each = matmul(each, w, "pallas") / 64
    np.testing.assert_array_equal(loop(x, stack), each)
