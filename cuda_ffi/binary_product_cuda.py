"""Products with sums of binary planes on NVIDIA GPUs, over plain arrays in the layout of layout.py."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import registration
from cuda_ffi.folding import fold_rows
from cuda_ffi.lut_product import Matrix

TARGET = "any4_cuda_binary_product"

MOST_ROWS = 32
"""The most rows of x for which the kernel is meant: it reads the weight anew for each two. XLA decodes it to memory."""

_MOST_PLANES = 4
_MOST_INPUTS = 32768
# Inputs that a warp takes at a time.
_TILE = 128
# A group size that no row reaches.
_WHOLE_ROW = 2**30


def why_not(
    x_dtype, rows: int, planes: int, group_size: int, shape: tuple[int, ...], lut_dtype, scale_dtype, offset_dtype
) -> str | None:
    """None if the kernel suits operands of these dtypes and sizes, else the reason in words.

    Args:
      rows: of x.
      shape: [N, K] of the weight; a group_size of at least K means one group a row.
      lut_dtype, scale_dtype, offset_dtype: of a plane; None if there are no offsets.
    """
    n, k = shape
    if x_dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x_dtype}, its tensor cores take bfloat16 and float16"
    if rows > MOST_ROWS:
        return f"x has {rows} rows, it takes at most {MOST_ROWS} for binary planes"
    if planes > _MOST_PLANES:
        return f"the sum has {planes} binary planes, it takes at most {_MOST_PLANES}"
    if k > _MOST_INPUTS:
        return f"rows have {k} inputs, binary planes take at most {_MOST_INPUTS}"
    if k == 0 or k % _TILE or (group_size < k and (group_size < _TILE or group_size & (group_size - 1))):
        return (
            f"rows have {k} inputs and groups {group_size}, binary planes need multiples of {_TILE}, and groups that "
            "are powers of two or rows"
        )
    if n * k // 8 >= 2**32:
        return f"a plane has {n * k // 8} bytes, binary planes need fewer than {2**32}"
    if any(dtype not in (jnp.bfloat16, None) for dtype in (lut_dtype, scale_dtype, offset_dtype)):
        return f"the table is {lut_dtype}, scales {scale_dtype}, offsets {offset_dtype}; binary planes need bfloat16"
    return None


def binary_product(x: jax.Array, planes: Sequence[Matrix], *, group_size: int) -> jax.Array:
    """y = x (sum of planes)^T [M, N] in x's dtype, accumulated in float32 over all planes.

    Signs and inputs are multiplied on tensor cores, and a group's scale multiplies the float32 sum of its products.
    Under vmap over x alone it has more rows; over weights it becomes a loop.

    Args:
      x: [M, K], bfloat16 or float16.
      planes: 1 to 4 planes [N, K] of 1 bit, for which `why_not` is None but for the number of rows.
      group_size: of all planes.

    Raises:
      RuntimeError: the library can't be used; `registration.why_not("cuda")` says why without raising.
    """
    registration.register("cuda")
    call = _call(group_size if group_size < x.shape[-1] else _WHOLE_ROW)
    return call(x, *(operand for plane in planes for operand in _operands(plane)))


def _operands(plane: Matrix) -> tuple[jax.Array, ...]:
    """Four arrays; one of no elements takes the place of absent offsets."""
    offsets = jnp.zeros(0, jnp.bfloat16) if plane.offsets is None else plane.offsets
    return plane.codes[0], plane.lut, plane.scales, offsets


@functools.cache
def _call(group_size: int) -> Callable[..., jax.Array]:
    """The product of (x, *operands) with its rule for vmap, which may add rows."""

    @fold_rows
    def call(x, *operands):
        y = jax.ShapeDtypeStruct((x.shape[0], operands[0].shape[0]), x.dtype)
        return jax.ffi.ffi_call(TARGET, y)(x, *operands, group_size=np.int64(group_size))

    return call
