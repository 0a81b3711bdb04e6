"""A matrix whose rows are another's columns."""

from typing import Any

import jax
import jax.numpy as jnp

from any4_jax.weights.operator import Operator, dense_product, dequantize, operator, product, take_rows


@operator(axes={"inner": "KN"})
class Transposed(Operator):
    """W[n, k] = inner[k, n].

    Group scales that are coded in groups of neighbouring rows, as in SpQR (arXiv 2306.03078), are such a matrix: a leaf
    has its groups along its own rows.

    Attributes:
      inner: operator [*L, K, N].
    """

    inner: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """(*L, N, K)."""
        *stack, k, n = self.inner.shape
        return (*stack, n, k)


@dequantize.register
def _(w: Transposed, dtype=jnp.float32) -> jax.Array:
    return jnp.swapaxes(dequantize(w.inner, dtype), -1, -2)


@product.register
def _(w: Transposed, x, backend=None):
    return dense_product(x, dequantize(w, x.dtype))


@take_rows.register
def _(w: Transposed, rows):
    return jnp.take(dequantize(w), rows, axis=0, mode="clip")
