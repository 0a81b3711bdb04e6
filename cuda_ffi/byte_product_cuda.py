"""Products of rounded inputs with tables of int8 on NVIDIA GPUs, over plain arrays in the layout of layout.py."""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import registration
from cuda_ffi.folding import fold_rows
from cuda_ffi.lut_product import Matrix
from cuda_ffi.lut_product_cuda import OPERANDS, _operands, _stacked

TARGET = "any4_cuda_byte_product"

MOST_ROWS = 2
"""The rows of x that one reading of the weight serves. More are left to the kernel for floating tables, which reads it
once, unless x has to be rounded to int8."""

Rounding = Literal["int8", "int16"]
_LIMBS: dict[Rounding, int] = {"int8": 1, "int16": 2}
# Inputs that a warp takes at a time, rows of W that two warps take, and the smallest group that has its own scale.
_TURN, _ROWS, _GROUP = 256, 32, 64


def why_not(
    x_dtype, bits: int, group_size: int, shape: tuple[int, int], lut_dtype, scale_dtype, offset_dtype
) -> str | None:
    """None if `byte_products` takes operands of these dtypes and sizes, else the reason in words.

    Args:
      shape: (N, K) of the weight.
      offset_dtype: None if there are no offsets.
    """
    n, k = shape
    if bits != 4 or lut_dtype != jnp.int8:
        return f"the table is {lut_dtype} of {2**bits} entries, it takes 16 of int8"
    if x_dtype != jnp.bfloat16:
        return f"x is {x_dtype}, it takes bfloat16"
    if scale_dtype != jnp.bfloat16 or offset_dtype not in (None, jnp.bfloat16):
        return f"scales are {scale_dtype}, offsets {offset_dtype}; it takes bfloat16"
    if group_size < k and (group_size < _GROUP or group_size & (group_size - 1)):
        return f"groups have {group_size} inputs, it takes powers of two from {_GROUP} on, or the whole row"
    if n % _ROWS or k % _TURN or not n * k:
        return f"the weight has the shape ({n}, {k}), it takes multiples of ({_ROWS}, {_TURN})"
    return None


def byte_products(
    x: jax.Array, matrices: Sequence[Matrix], *, group_size: int, rounding: Rounding
) -> tuple[jax.Array, ...]:
    """y = q(x) W^T [M, N] of each matrix, in bfloat16, by integer products, accumulated in float32 over groups.

    q rounds x to integers whose scale is that of the largest magnitude among neighbours: with "int8" to -127 to 127 by
    32 inputs, as the CPU's `byte_product` does; with "int16" to -32639 to 32639 by 64 inputs, which costs no more for a
    row of x, and whose error lies far below the rounding of y. A weight is read once for each MOST_ROWS rows. One call
    does all matrices; each gets the same bits as alone. Under vmap over x alone it stays one call, with more rows; over
    weights it becomes a loop that reads each where it lies.

    Args:
      x: [M, K], bfloat16.
      matrices: at least one Matrix or StackedMatrix, each [N, K] with its own N, and tables of int8 [N or 1, 16] with
        entries from -127 to 127; -128 counts as -127.
      group_size: of all matrices.
      rounding: of x.

    Raises:
      ValueError: the operands are none of these; the sentence says what is wrong.
      RuntimeError: the library can't be used; `registration.why_not("cuda")` says why without raising.
    """
    for matrix in matrices:
        offsets = None if matrix.offsets is None else matrix.offsets.dtype
        shape = matrix.codes[0].shape[-2], x.shape[-1]
        reason = why_not(x.dtype, 4, group_size, shape, matrix.lut.dtype, matrix.scales.dtype, offsets)
        if reason is not None:
            raise ValueError(f"{reason}; use another backend")
    registration.register("cuda")
    call = _call(min(group_size, x.shape[-1]), _LIMBS[rounding])
    return call(x, *(operand for matrix in matrices for operand in _operands(matrix)))


@functools.cache
def _call(group_size: int, limbs: int):
    """The products of (x, *operands) with their rule for vmap, which may add rows."""

    def call(x, *operands):
        outs = [jax.ShapeDtypeStruct((x.shape[0], codes.shape[1]), x.dtype) for codes in operands[::OPERANDS]]
        return tuple(
            jax.ffi.ffi_call(TARGET, outs)(x, *operands, group_size=np.int64(group_size), limbs=np.int64(limbs))
        )

    return fold_rows(call, _stacked)
