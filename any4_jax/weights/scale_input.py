"""A scale for each input feature."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax.weights.operator import Operator, dequantize, operator, product, take_rows


@operator(axes={"scale": "K"})
class ScaleInput(Operator):
    """W[:, k] = inner[:, k] * scale[k]: the input is scaled before the inner product.

    AWQ (arXiv 2306.00978) and SmoothQuant (arXiv 2211.10438) need it.

    Attributes:
      inner: operator [*L, N, K].
      scale: floating [*L, K].
    """

    inner: Any
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """(*L, N, K)."""
        return self.inner.shape


@dequantize.register
def _(w: ScaleInput, dtype=jnp.float32) -> jax.Array:
    return (dequantize(w.inner) * w.scale.astype(jnp.float32)[..., None, :]).astype(dtype)


@product.register
def _(w: ScaleInput, x, backend=None):
    return product(w.inner, (x.astype(jnp.float32) * w.scale.astype(jnp.float32)[None]).astype(x.dtype), backend)


@take_rows.register
def _(w: ScaleInput, rows):
    return dataclasses.replace(w, inner=take_rows(w.inner, rows))
