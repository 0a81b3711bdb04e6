"""Products with sums of binary planes on the CPU, by tables of signed sums of inputs (LUT-GEMM, arXiv 2206.09557)."""

from collections.abc import Sequence

import jax

from cuda_ffi.lut_product import Matrix, call_products

TARGET = "any4_cpu_binary_product"

MULTIPLE = 32
"""Tables take groups of a multiple of so many inputs, or rows: none may end within a word."""

MOST_LOOKED_UP = 32
"""The most rows of x times planes for which three planes or more are looked up. Each row of x is looked up in each
plane by itself, where decoding makes one matrix of all planes. With two planes that doesn't pay, whatever the rows."""

_FEW_PLANES = 2


def why_not_tables(rows: int, planes: int, k: int, group_size: int) -> str | None:
    """None if `binary_products` looks up sums in tables for so many rows of x and planes, else the reason in words."""
    if group_size < k and group_size % MULTIPLE:
        return f"groups have {group_size} inputs, tables take multiples of {MULTIPLE}, or the whole row"
    if planes > _FEW_PLANES and rows * planes > MOST_LOOKED_UP:
        return f"x has {rows} rows, for {planes} planes tables are faster up to {MOST_LOOKED_UP // planes}"
    return None


def binary_products(
    x: jax.Array, sums: Sequence[Sequence[Matrix]], *, group_size: int, tables: bool | None = None, isa: str = "auto"
) -> tuple[jax.Array, ...]:
    """y = x (sum of planes)^T [M, N] for each sum, in x's dtype, accumulated in float32 over all of its planes.

    With tables, the signed sums of 3, 4 or 8 inputs, according to the instruction set, are made of x once for all of
    `sums`; a few bits of a code then look up what these inputs add to a product. Without, planes are decoded.

    Args:
      x: [M, K], float32, bfloat16 or float16.
      sums: at least one; each of the same number of planes [N, K] of 1 bit, with an N of its own.
      group_size: G of all planes.
      tables: whether to look up sums; None if `why_not_tables` is.
      isa: as in `lut_products`.

    Raises:
      RuntimeError: the library can't be used; `registration.why_not("cpu")` says why without raising.
    """
    planes = len(sums[0])
    if tables is None:
        tables = why_not_tables(x.shape[0], planes, x.shape[-1], group_size) is None
    matrices = [plane for planes_of_one in sums for plane in planes_of_one]
    return call_products(TARGET, x, matrices, planes=planes, group_size=group_size, tables=tables, isa=isa)
