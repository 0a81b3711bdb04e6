"""Products of rounded inputs with weights of bytes on the CPU, over plain arrays in the layout of layout.py."""

from collections.abc import Sequence

import jax

from cuda_ffi.lut_product import Matrix, call_products

TARGET = "any4_cpu_byte_product"


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
    return call_products(TARGET, x, matrices, bits=bits, group_size=group_size, isa=isa)
