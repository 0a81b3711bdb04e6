"""Products of rounded inputs with weights of bytes on the CPU, over plain arrays in the layout of layout.py."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import registration
from cuda_ffi.folding import fold_rows
from cuda_ffi.lut_product import Matrix, readable

TARGET = "any4_cpu_byte_product"
OPERANDS = 4


def byte_products(
    x: jax.Array, matrices: Sequence[Matrix], *, bits: int, group_size: int, isa: str = "auto"
) -> tuple[jax.Array, ...]:
    """y = q(x) W^T [M, N] of each matrix, in x's dtype, by integer products, accumulated in float32 over groups.

    q rounds each 32 inputs of a row to integers of -127 to 127, with the largest magnitude / 127 as their scale. One
    call does all matrices: it rounds x once, and threads share the rows of all matrices. Under vmap over x alone it
    stays one call, with more rows; over weights it becomes a loop.

    Args:
      x: [M, K], float32, bfloat16 or float16.
      matrices: at least one, each [N, K] with an N of its own. The lut is int8 [N or 1, 16]; or floating, with 16 or
        256 entries, of which the first two and the middle one are read: it must be a ramp.
      bits: of the codes of all matrices, 4 or 8.
      group_size: G of all matrices, a multiple of 32, or at least K.
      isa: the instruction set: "avx512vbmi", "avx512vnni", "avx512", "avxvnni", "avx2", "dotprod" (ARM), "portable", or
        "auto" for the best that this processor has. AVX-512 without VNNI has AVX2's kernel.

    Raises:
      RuntimeError: the library can't be used; `registration.why_not("cpu")` says why without raising.
    """
    registration.register("cpu")
    operands = [operand for matrix in matrices for operand in _operands(matrix, bits)]
    call = _call(bits, min(group_size, max(x.shape[-1], 1)), isa)
    if x.dtype == jnp.float16:
        return tuple(y.astype(x.dtype) for y in call(x.astype(jnp.float32), *operands))
    return call(x, *operands)


def _operands(matrix: Matrix, bits: int) -> tuple[jax.Array, ...]:
    """OPERANDS arrays; an array of no elements takes the place of an absent one."""
    (codes,) = matrix.codes
    table = bits == 4 and matrix.lut.dtype == jnp.int8
    offsets = jnp.zeros((0, 0), jnp.float32) if matrix.offsets is None else readable(matrix.offsets)
    return codes, matrix.lut if table else readable(matrix.lut), readable(matrix.scales), offsets


@functools.cache
def _call(bits: int, group_size: int, isa: str):
    """The custom call on (x, *operands) with its rule for vmap."""

    @fold_rows
    def call(x, *operands):
        outs = [jax.ShapeDtypeStruct((x.shape[0], codes.shape[0]), x.dtype) for codes in operands[::OPERANDS]]
        ys = jax.ffi.ffi_call(TARGET, outs)(x, *operands, bits=np.int64(bits), group_size=np.int64(group_size), isa=isa)
        return tuple(ys)

    return call
