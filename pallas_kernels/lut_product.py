"""The product with a LUT-coded weight on NVIDIA GPUs, for machines without a CUDA compiler: over plain arrays in the
layout of layout.py."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import choice as choices
from pallas_kernels.choice import Choice, Problem
from pallas_kernels.device import gpu_name
from pallas_kernels.mosaic_narrow import lut_product_narrow
from pallas_kernels.mosaic_wide import lut_product_wide
from pallas_kernels.triton_dequantize import lut_dequantize
from pallas_kernels.triton_gemm import inputs_of_step, lut_gemm
from pallas_kernels.triton_gemv import lut_gemv
from pallas_kernels.triton_operands import Weight, can_permute

_FLOATING = (jnp.bfloat16, jnp.float16, jnp.float32)


def why_not(x_dtype, bits: int, group_size: int, k: int, lut_dtype, scale_dtype, offset_dtype) -> str | None:
    """None where `lut_product` takes operands of these dtypes and sizes, else the reason in words.

    Args:
      k: inputs of the weight; a group_size of at least k makes each row one group.
      offset_dtype: None where there are no offsets.
    """
    if x_dtype not in _FLOATING:
        return f"x is {x_dtype}, but the kernels take bfloat16, float16 and float32"
    if bits not in (2, 3, 4, 8):
        return f"codes have {bits} bits, but the kernels take 2, 3, 4 and 8"
    if lut_dtype not in _FLOATING or scale_dtype not in (*_FLOATING, jnp.uint8):
        return (
            f"the table is {lut_dtype} and scales are {scale_dtype}, "
            "but the kernels take bfloat16, float16, float32, and e8m0 scales"
        )
    if offset_dtype is not None and offset_dtype not in _FLOATING:
        return f"offsets are {offset_dtype}, but the kernels take bfloat16, float16 and float32"
    if group_size < k and (group_size < 16 or group_size & (group_size - 1)):
        return f"groups have {group_size} inputs, but the kernels take powers of two from 16 on, or the whole row"
    if k == 0:
        return "the weight has no inputs"
    return None


def lut_product(
    x: jax.Array,
    codes: tuple[jax.Array, ...],
    lut: jax.Array,
    scales: jax.Array,
    offsets: jax.Array | None,
    *,
    bits: int,
    group_size: int,
    choice: Choice | None = None,
    interpret: bool = False,
) -> jax.Array:
    """y = x W^T in x's dtype, accumulated in float32.

    W[n, k] = lut[n or 0, codes[n, k]] * scales[n, k // group_size] + offsets[n, k // group_size]. Triton's kernels for
    few rows of x compute with W in float32; the kernels on wgmma, and those that decode W to memory, round each weight
    once to x's dtype.

    Args:
      x: [M, K], bfloat16, float16 or float32.
      codes: one or two planes, uint8 [N, ceil(K * width / 8)].
      lut: [N or 1, 2**bits], floating.
      scales: [N, ceil(K / group_size)], floating, or uint8 for exponents of e8m0.
      offsets: like scales but floating, or None.
      bits: 2, 3, 4 or 8.
      group_size: a power of two, at least 16; or at least K.
      choice: the kernel and its configuration; None for that of `choice.choose`, which needs to know the GPU.
      interpret: whether to run a Triton kernel in jax's interpreter, on any device; for tests.

    Returns:
      [M, N].

    Raises:
      ValueError: the kernels don't take these operands, or there is no NVIDIA GPU to choose a kernel for.
    """
    (m, k), n = x.shape, codes[0].shape[0]
    offset_dtype = None if offsets is None else offsets.dtype
    reason = why_not(x.dtype, bits, group_size, k, lut.dtype, scales.dtype, offset_dtype)
    if reason is not None:
        raise ValueError(f"{reason}; use another backend")
    if m == 0 or n == 0:
        return jnp.zeros((m, n), x.dtype)
    if choice is None:
        gpu = gpu_name()
        if gpu is None:
            raise ValueError("got no NVIDIA GPU to choose a kernel for; name one with jax.sharding.AbstractDevice")
        problem = Problem(n, k, m, bits, group_size, x.dtype, lut.dtype, scales.dtype, offset_dtype, gpu)
        choice = choices.choose(problem)
    return _product(x, codes, lut, scales, offsets, bits, group_size, choice.kernel, choice.config, interpret)


# Jitted by itself, so that equal products in a program are traced and lowered only once: lowering a kernel on wgmma
# takes a third of a second.
@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8, 9))
def _product(
    x: jax.Array,
    codes: tuple[jax.Array, ...],
    lut: jax.Array,
    scales: jax.Array,
    offsets: jax.Array | None,
    bits: int,
    group_size: int,
    kernel: str,
    config: Any,
    interpret: bool,
) -> jax.Array:
    if scales.dtype == jnp.uint8:
        scales = jax.lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)
    if kernel in ("mosaic_narrow", "mosaic_wide"):
        run = lut_product_narrow if kernel == "mosaic_narrow" else lut_product_wide
        return run(x, codes[0], lut, scales, offsets, group_size, config)
    w = Weight(codes, lut, scales, offsets, bits, x.shape[1], group_size)
    columns = inputs_of_step(w) // 2 if kernel == "triton_gemm" else config.columns
    permute = not interpret and can_permute(w, columns, config.rows, config.warps)
    lookup = "permute" if permute else "loads"
    if kernel == "triton_gemv":
        return lut_gemv(x, w, config, lookup, interpret)
    if kernel == "triton_gemm":
        return lut_gemm(x, w, config, lookup, interpret)
    # Ties W to x: otherwise XLA may decode W before a loop over x, and keep the dense matrix throughout the loop.
    x, arrays = jax.lax.optimization_barrier((x, tuple(w.arrays())))
    dense = lut_dequantize(w.replaced(arrays), x.dtype, config, lookup, interpret)
    y = jax.lax.dot_general(
        x,
        dense,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return y.astype(x.dtype)
