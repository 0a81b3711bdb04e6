"""Inputs in another order."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax.weights.operator import Operator, dequantize, operator, product, take_rows


@operator(axes={"permutation": "K"})
class PermuteInput(Operator):
    """W[:, permutation[i]] = inner[:, i]: the inner operator gets its inputs in another order (act-order).

    Attributes:
      inner: operator [*L, N, K].
      permutation: int32 [*L, K], a permutation of 0..K-1.
    """

    inner: Any
    permutation: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """(*L, N, K)."""
        return self.inner.shape


@dequantize.register
def _(w: PermuteInput, dtype=jnp.float32) -> jax.Array:
    return jnp.take_along_axis(dequantize(w.inner, dtype), jnp.argsort(w.permutation)[..., None, :], axis=-1)


@product.register
def _(w: PermuteInput, x, backend=None):
    return product(w.inner, jnp.take(x, w.permutation, axis=-1), backend)


@take_rows.register
def _(w: PermuteInput, rows):
    return dataclasses.replace(w, inner=take_rows(w.inner, rows))
