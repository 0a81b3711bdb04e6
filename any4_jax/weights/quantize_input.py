"""Inputs rounded on the fly. The product is in any4_jax.product.plan, which knows what kernels multiply integers."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from any4_jax.weights.operator import Operator, dequantize, operator, take_rows


@operator(static=("bits", "symmetric", "per"), axes={"levels": ".", "scale": ""})
class QuantizeInput(Operator):
    """The input is quantized on the fly to `bits` before the inner product; the weight is that of `inner`.

    Attributes:
      inner: operator [*L, N, K].
      levels: None for integers, else floating [*L, 2**bits], ascending in [-1, 1], onto which x / absmax is rounded.
      bits: 2..8 (static).
      symmetric: a scale without a zero point (static); tables are always symmetric.
      per: what has a scale of its own (static): "token" for each row of x, "tensor" for all of x, "group" for each 32
        inputs of a row, whatever the weight's group size. With "group" the product is computed in float32 and rounded
        once to x's dtype; a kernel may multiply the integers, which gives the same but for the order of float32 sums.
      scale: None for scales that are found in x; else floating [*L], the |x| at which the grid of all inputs ends, and
        larger ones are clipped. It needs `symmetric`, and "tensor" for `per`.
    """

    inner: Any
    levels: jax.Array | None
    bits: int
    symmetric: bool
    per: Literal["token", "tensor", "group"]
    scale: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(*L, N, K)."""
        return self.inner.shape


@dequantize.register
def _(w: QuantizeInput, dtype=jnp.float32) -> jax.Array:
    return dequantize(w.inner, dtype)


@take_rows.register
def _(w: QuantizeInput, rows):
    return dataclasses.replace(w, inner=take_rows(w.inner, rows))
