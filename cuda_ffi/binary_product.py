"""Products with sums of binary planes on the CPU, by tables of signed sums of inputs (LUT-GEMM, arXiv 2206.09557)."""

from collections.abc import Sequence

import jax

from cuda_ffi.lut_product import Matrix, call_products

TARGET = "any4_cpu_binary_product"

MULTIPLE = 32
"""Groups have a multiple of so many inputs, or are rows: none may end within a word of codes."""


def why_not(k: int, group_size: int) -> str | None:
    """None if `binary_products` takes groups of this size in rows of k inputs, else the reason in words."""
    if group_size >= k or group_size % MULTIPLE == 0:
        return None
    return f"groups have {group_size} inputs, its tables take multiples of {MULTIPLE}, or the whole row"


def binary_products(
    x: jax.Array, sums: Sequence[Sequence[Matrix]], *, group_size: int, isa: str = "auto"
) -> tuple[jax.Array, ...]:
    """y = x (sum of planes)^T [M, N] for each sum, in x's dtype, accumulated in float32 over all of its planes.

    Tables of signed sums of 3, 4 or 8 inputs, according to the instruction set, are made of x once for all sums. A few
    bits of a code then look up what these inputs add to a product. It suits few rows of x: each is looked up by itself.

    Args:
      x: [M, K], float32, bfloat16 or float16.
      sums: at least one; each of the same number of planes [N, K] of 1 bit, with an N of its own.
      group_size: G of all planes, for which `why_not` is None.
      isa: as in `lut_products`.

    Raises:
      RuntimeError: the library can't be used; `registration.why_not("cpu")` says why without raising.
    """
    matrices = [plane for planes in sums for plane in planes]
    return call_products(TARGET, x, matrices, planes=len(sums[0]), group_size=group_size, isa=isa)
