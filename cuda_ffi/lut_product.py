"""Products with LUT-coded weights on the CPU, over plain arrays in the layout of layout.py."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import registration
from cuda_ffi.folding import fold_rows

TARGET = "any4_cpu_lut_product"
_OPERANDS = 5


@dataclasses.dataclass(frozen=True)
class Matrix:
    """W[n, k] = lut[n or 0, codes[n, k]] * scales[n, k // G] + offsets[n, k // G].

    Attributes:
      codes: one or two planes, uint8 [N, ceil(K * width / 8)].
      lut: [N or 1, 2**bits], a floating dtype.
      scales: [N, ceil(K / G)], a floating dtype, or uint8 for exponents of e8m0.
      offsets: like scales but floating, or None.
    """

    codes: tuple[jax.Array, ...]
    lut: jax.Array
    scales: jax.Array
    offsets: jax.Array | None


def lut_products(
    x: jax.Array, matrices: Sequence[Matrix], *, bits: int, group_size: int, isa: str = "auto"
) -> tuple[jax.Array, ...]:
    """y = x W^T [M, N] of each matrix, in x's dtype, accumulated in float32, without a dense W in memory.

    One call does all matrices: it arranges the rows of x once, and threads share the rows of all matrices. Under vmap
    over x alone it stays one call, with more rows; over weights it becomes a loop.

    Args:
      x: [M, K], float32, bfloat16 or float16.
      matrices: at least one, each [N, K] with an N of its own.
      bits: of the codes of all matrices, 1 to 6, or 8.
      group_size: G of all matrices, at least 1.
      isa: the instruction set: "avx512", "avx2", "portable", or "auto" for the best that this processor has. Those that
        `byte_products` names beside these have the kernel of the one that they extend.

    Raises:
      RuntimeError: the library can't be used; `registration.why_not("cpu")` says why without raising.
    """
    return call_products(TARGET, x, matrices, bits=bits, group_size=group_size, isa=isa)


def call_products(
    target: str, x: jax.Array, matrices: Sequence[Matrix], *others: jax.Array, **attributes: Any
) -> tuple[jax.Array, ...]:
    """y [M, N] of each matrix in x's dtype, from one of the handlers that read x and these matrices. With an attribute
    `planes`, so many consecutive matrices have one y, that of their sum.

    Args:
      target: the handler's name.
      x: [M, K], float32, bfloat16 or float16.
      matrices: at least one; tables of int8 stay as they are.
      others: what the handler reads between x and the matrices.
      attributes: of the handler; group_size is cut to K.

    Raises:
      RuntimeError: the library can't be used.
    """
    registration.register("cpu")
    attributes["group_size"] = min(attributes["group_size"], max(x.shape[-1], 1))
    call = _call(target, len(others), tuple(attributes.items()))
    operands = *others, *(operand for matrix in matrices for operand in _operands(matrix))
    if x.dtype == jnp.float16:
        return tuple(y.astype(x.dtype) for y in call(x.astype(jnp.float32), *operands))
    return call(x, *operands)


def _operands(matrix: Matrix) -> tuple[jax.Array, ...]:
    """_OPERANDS arrays; an array of no elements takes the place of an absent one."""
    high = matrix.codes[1] if len(matrix.codes) > 1 else jnp.zeros((0, 0), jnp.uint8)
    lut = matrix.lut if matrix.lut.dtype == jnp.int8 else _readable(matrix.lut)
    offsets = jnp.zeros((0, 0), jnp.float32) if matrix.offsets is None else _readable(matrix.offsets)
    return matrix.codes[0], high, lut, _readable(matrix.scales), offsets


def _readable(stored: jax.Array) -> jax.Array:
    """The handlers read float32, bfloat16 and e8m0; float16 becomes float32, which holds its values."""
    return stored if stored.dtype in (jnp.float32, jnp.bfloat16, jnp.uint8) else stored.astype(jnp.float32)


@functools.cache
def _call(target: str, others: int, fields: tuple[tuple[str, Any], ...]) -> Callable[..., tuple[jax.Array, ...]]:
    """The custom call on (x, *others, *operands) with its rule for vmap."""
    attributes = dict(fields)
    passed = {name: np.int64(value) if type(value) is int else value for name, value in fields}

    @fold_rows
    def call(x, *operands):
        first = operands[others :: _OPERANDS * attributes.get("planes", 1)]
        outs = [jax.ShapeDtypeStruct((x.shape[0], codes.shape[0]), x.dtype) for codes in first]
        return tuple(jax.ffi.ffi_call(target, outs)(x, *operands, **passed))

    return call
