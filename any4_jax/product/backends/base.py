"""How a kernel describes itself to `any4_jax.product.plan`, and what kernels read of a weight."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from any4_jax import choice
from any4_jax.weights import QuantizedTensor, dequantize, is_operator, leaf_of


@dataclasses.dataclass(frozen=True)
class Backend(choice.Backend):
    """A kernel family: what `any4_jax.choice.Backend` says, where the problem is (x, w).

    Attributes:
      name: what `matmul(backend=...)` calls it.
      supports: (x, w, platform) -> None, or the reason why it can't, in words; x is an array or ShapeDtypeStruct
        [..., K], w any operator or array. It looks only at types, shapes, dtypes and the platform, so it works while
        tracing.
      run: (x [M, K], w [N, K]) -> y [M, N] in x's dtype, for what it supports.
      run_together: (x [M, K], several weights that agree in bits, group size and K) -> y [M, N] of each, in one call
        that is faster than several; None where there is no such call.
      takes_slices: whether `run` and `run_together` also take a Slice, and read the matrix in place in its stack. A
        backend that doesn't gets a copy of the matrix.
      detail: (x, w) -> which of its kernels the product takes and why, in words, for operands that it supports; None
        where there is nothing to say.
    """

    run_together: Callable[[jax.Array, Sequence[Any]], tuple[jax.Array, ...]] | None = None
    takes_slices: bool = False
    detail: Callable[[Any, Any], str | None] | None = None


class Arrays(NamedTuple):
    """What kernels read of a QuantizedTensor: codes as a tuple of planes, and scales and offsets as arrays. Those that
    are operators are decoded to float32 for each product, and a table of integers becomes one of bfloat16."""

    codes: tuple[jax.Array, ...]
    lut: jax.Array
    scales: jax.Array
    offsets: jax.Array | None


class Dtypes(NamedTuple):
    """The dtypes of `Arrays`; that of offsets is None where there are none."""

    lut: Any
    scales: Any
    offsets: Any


def arrays_of(w: QuantizedTensor, as_stored: bool = False, decode: Callable[[Any], jax.Array] = dequantize) -> Arrays:
    """The arrays of a leaf; a table of integers as floats, unless the kernel reads it `as_stored`. `decode` gives the
    values of scales or offsets that are operators."""
    scales, offsets = (decode(a) if is_operator(a) else a for a in (w.scales, w.offsets))
    return Arrays(w.planes, w.lut if as_stored else w.lut.astype(_read_as(w.lut.dtype)), scales, offsets)


def dtypes_of(w: QuantizedTensor) -> Dtypes:
    """The dtypes of what `arrays_of` returns, without decoding anything."""
    scales, offsets = (
        jnp.dtype(jnp.float32) if is_operator(a) else getattr(a, "dtype", None) for a in (w.scales, w.offsets)
    )
    return Dtypes(_read_as(w.lut.dtype), scales, offsets)


def _read_as(lut_dtype: Any) -> Any:
    """The dtype in which kernels read a table: bfloat16, which holds all of int8, for integers."""
    return lut_dtype if jnp.issubdtype(lut_dtype, jnp.floating) else jnp.dtype(jnp.bfloat16)


def why_no_codes(w: Any) -> str | None:
    """Why a kernel for codes into tables can't take a weight of this type; None for a QuantizedTensor or a Slice."""
    if leaf_of(w) is not None:
        return None
    kind = f"a {type(w).__name__}" if is_operator(w) else "a plain array"
    return f"it multiplies floating x by the codes of a QuantizedTensor, the weight is {kind}"
