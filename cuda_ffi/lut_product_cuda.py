"""The product with a LUT-coded weight on NVIDIA GPUs, over plain arrays in the layout of layout.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import registration
from cuda_ffi.folding import fold_rows
from cuda_ffi.layout import PLANES

PRODUCT = "any4_cuda_lut_product"
DEQUANTIZE = "any4_cuda_lut_dequantize"

MOST_ROWS = 64
"""Of x, in the kernels that decode W anew for each 32 rows; beyond, W is decoded once to memory, for XLA's product.

That is for 4-bit codes in groups of 128. Others are decoded anew for each eight columns of work, up to MOST_COLUMNS;
a row of x is as many columns as there are groups in 128 inputs. On an H100 either way costs about the same there.
"""
MOST_COLUMNS = 24

# A lane decodes 32 inputs; rows of W that are no multiple of them are filled up, in a copy.
_UNIT = 32
# Inputs that a warp takes at a time.
_TILE = 128
# A group size that no row reaches.
_WHOLE_ROW = 2**30


def why_not(x_dtype, bits: int, group_size: int, k: int, lut_dtype, scale_dtype, offset_dtype) -> str | None:
    """None where `lut_product` takes operands of these dtypes and sizes, else the reason in words.

    Args:
      k: inputs of the weight; group_size of at least k is one group a row.
      offset_dtype: None where there are no offsets.
    """
    if x_dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x_dtype}, its tensor cores take bfloat16 and float16"
    if bits not in (2, 3, 4, 8):
        return f"codes have {bits} bits, it takes 2, 3, 4 and 8"
    if lut_dtype not in (jnp.bfloat16, jnp.float16) or (lut_dtype == jnp.float16 and x_dtype == jnp.bfloat16):
        return f"the table is {lut_dtype}, it needs one that {x_dtype} holds"
    if group_size < k and (group_size < 16 or group_size & (group_size - 1)):
        return f"groups have {group_size} inputs, it takes powers of two from 16 on, or the whole row"
    stored = (jnp.bfloat16, jnp.float16, jnp.float32)
    if scale_dtype not in (*stored, jnp.uint8) or (offset_dtype is not None and offset_dtype not in stored):
        return f"scales are {scale_dtype}, offsets {offset_dtype}; it takes bfloat16, float16, float32, and e8m0 scales"
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
) -> jax.Array:
    """y = x W^T in x's dtype, accumulated in float32.

    W[n, k] = lut[n or 0, codes[n, k]] * scales[n, k // group_size] + offsets[n, k // group_size]. With few rows of x
    (see MOST_ROWS) codes are decoded in registers, there is no dense W in memory, and scales and offsets are applied to
    the float32 sums of a group's products. Under vmap over x alone it stays one call with more rows; with a batch of
    weights it is a loop over them.

    Args:
      x: [M, K], bfloat16 or float16.
      codes: one or two planes, uint8 [N, ceil(K * width / 8)].
      lut: [N or 1, 2**bits] of x's dtype; or bfloat16 with x of float16, to which it is then rounded. Of 8 bits it is
        an arithmetic ramp.
      scales: [N, ceil(K / group_size)]: bfloat16, float16, float32, or uint8 for exponents of e8m0.
      offsets: like scales but floating, or None.
      bits: 2, 3, 4 or 8.
      group_size: a power of two, at least 16; or at least K.

    Raises:
      ValueError: the operands are none of these, in words.
      RuntimeError: the library can't be used; `registration.why_not("cuda")` says why without raising.
    """
    reason = why_not(
        x.dtype, bits, group_size, x.shape[-1], lut.dtype, scales.dtype, None if offsets is None else offsets.dtype
    )
    if reason is not None:
        raise ValueError(f"{reason}; use another backend")
    registration.register("cuda")
    # Where there is none, an array of no elements takes its place.
    high = codes[1] if len(codes) > 1 else jnp.zeros((0, 0), jnp.uint8)
    absent = jnp.zeros((0, 0), jnp.float32)
    call = _call(bits, group_size if group_size < x.shape[-1] else _WHOLE_ROW)
    return call(x, codes[0], high, lut, scales, absent if offsets is None else offsets)


@functools.cache
def _call(bits: int, group_size: int):
    """The product of (x, *operands) with its rule for vmap, which may bring more rows."""
    attributes = {"bits": np.int64(bits), "group_size": np.int64(group_size)}

    @fold_rows
    def call(x, *operands):
        short = -x.shape[1] % _UNIT
        if short:
            x = jnp.pad(x, [(0, 0), (0, short)])
            operands = (*_filled(operands[:2], x.shape[1], bits), *operands[2:])
        rows, inputs, outputs = x.shape[0], x.shape[1], operands[0].shape[0]
        columns = rows * max(1, _TILE // group_size)
        if columns <= (MOST_ROWS if (bits, group_size) == (4, _TILE) else MOST_COLUMNS):
            return jax.ffi.ffi_call(PRODUCT, jax.ShapeDtypeStruct((rows, outputs), x.dtype))(x, *operands, **attributes)
        dense = jax.ffi.ffi_call(DEQUANTIZE, jax.ShapeDtypeStruct((outputs, inputs), x.dtype))(*operands, **attributes)
        y = jax.lax.dot_general(x, dense, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return y.astype(x.dtype)

    return call


def _filled(planes: tuple[jax.Array, ...], inputs: int, bits: int) -> tuple[jax.Array, ...]:
    """Planes of codes with rows of `inputs` codes, zeros at the end; absent planes as they are."""
    widths = (*PLANES[bits], 0)[: len(planes)]
    return tuple(
        jnp.pad(plane, [(0, 0), (0, inputs * width // 8 - plane.shape[1])]) if plane.size else plane
        for plane, width in zip(planes, widths, strict=True)
    )
