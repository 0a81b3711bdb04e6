"""The products that XLA computes, on every platform: the reference that every kernel must match."""

from typing import Any

import jax

from any4_jax.product.backends.base import Backend
from any4_jax.product.quantized_input import integer_product, is_integer_product, product_of_rounded, why_no_bytes
from any4_jax.weights import (
    QuantizeInput,
    Sparse,
    binary_planes,
    dense_product,
    dequantize,
    is_operator,
    leaf_of,
    sparse_product,
)


def _is_integer(w: Any) -> bool:
    return isinstance(w, QuantizeInput) and is_integer_product(w)


def _is_bytes(w: Any) -> bool:
    return isinstance(w, QuantizeInput) and why_no_bytes(w) is None


def _supports(x: Any, w: Any, platform: str) -> str | None:
    coded = leaf_of(w) is not None or binary_planes(w) or isinstance(w, Sparse)
    if coded or _is_integer(w) or _is_bytes(w) or not is_operator(w):
        return None
    return f"it multiplies by the parts of a {type(w).__name__}, one by one"


def _run(x: jax.Array, w: Any) -> jax.Array:
    if _is_integer(w):
        return integer_product(x, w)
    if _is_bytes(w):
        return product_of_rounded(x, w, lambda inner, rounded: _run(rounded, inner))
    if isinstance(w, Sparse):
        return sparse_product(x, w)
    # Ties the weight to x: else XLA dequantizes every layer before a decoding loop, and keeps all of them through it.
    x, w = jax.lax.optimization_barrier((x, w))
    return dense_product(x, dequantize(w, x.dtype))


def _detail(x: Any, w: Any) -> str | None:
    if _is_integer(w):
        return "x is rounded to integers, which multiply the codes as int8"
    return "x is rounded, and multiplies as floats" if _is_bytes(w) else None


XLA = Backend(name="xla", supports=_supports, run=_run, detail=_detail)
