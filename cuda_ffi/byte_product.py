"""Products of rounded inputs with weights of bytes on the CPU, over plain arrays in the layout of layout.py."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cuda_ffi.lut_product import Matrix, call_products

TARGET = "any4_cpu_byte_product"


@dataclasses.dataclass(frozen=True)
class Rounding:
    """q, the integers of x = scale * (q - zero).

    Attributes:
      bits: of an integer, 2 to 8: from -2^(bits-1) to 2^(bits-1) - 1.
      symmetric: whether zero is 0, and scale the largest magnitude / (2^(bits-1) - 1).
      by_row: whether a row of x has one scale; else each 32 of its inputs do, which takes 8 bits and symmetric ones.
    """

    bits: int = 8
    symmetric: bool = True
    by_row: bool = False


def byte_products(
    x: jax.Array,
    matrices: Sequence[Matrix],
    *,
    bits: int,
    group_size: int,
    rounding: Rounding = Rounding(),
    grid: jax.Array | None = None,
    isa: str = "auto",
) -> tuple[jax.Array, ...]:
    """y = q(x) W^T [M, N] of each matrix, in x's dtype, by integer products, accumulated in float32 over groups.

    q rounds x to integers. One call does all matrices: it rounds x once, and threads share the rows of all matrices.
    Under vmap over x alone it stays one call, with more rows; over weights or the grid it becomes a loop.

    Args:
      x: [M, K], float32, bfloat16 or float16.
      matrices: at least one, each [N, K] with an N of its own. The lut is int8 for codes of at most 4 bits; or it is a
        ramp, of which the first two and the middle entry are read.
      bits: of the codes of all matrices, 1 to 6, or 8.
      group_size: G of all matrices, at least K, or a multiple of 32; of 8 where a row has one scale.
      rounding: how x is rounded.
      grid: float32 [1 or M, 3], for rows with one scale: 1 / scale, scale and zero, of all rows or of each. None to
        find them from the row.
      isa: the instruction set: "avx512vbmi", "avx512vnni", "avx512", "avxvnni", "avx2", "dotprod" (ARM),
        "portable", or "auto" for the best of this processor. AVX-512 without VNNI has AVX2's kernel.

    Raises:
      RuntimeError: the library can't be used; `registration.why_not("cpu")` says why without raising.
    """
    return call_products(
        TARGET,
        x,
        [_readable(matrix, bits) for matrix in matrices],
        jnp.zeros((0, 3), jnp.float32) if grid is None else grid,
        bits=bits,
        group_size=group_size,
        input_bits=rounding.bits,
        by_row=rounding.by_row,
        symmetric=rounding.symmetric,
        isa=isa,
    )


def _readable(matrix: Matrix, bits: int) -> Matrix:
    """The handler looks up tables of at most 16 bytes; longer ones are ramps, which it reads as floats."""
    return matrix if bits <= 4 else dataclasses.replace(matrix, lut=matrix.lut.astype(jnp.float32))
