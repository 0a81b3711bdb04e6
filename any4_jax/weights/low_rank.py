"""The product of two thin matrices."""

import dataclasses

import jax
import jax.numpy as jnp

from any4_jax.weights.operator import Operator, dense_product, dequantize, operator, product, take_rows


@operator(axes={"a": ".K", "b": "N.", "scale": ""}, trains={"a": "lora", "b": "lora", "scale": None})
class LowRank(Operator):
    """W = scale * b @ a, of rank R: the update of LoRA (arXiv 2106.09685, section 4.1), with alpha / R as the scale.

    Attributes:
      a: floating [*L, R, K], the factor that multiplies x first.
      b: floating [*L, N, R].
      scale: float32 [*L]; [] for one matrix. A constant.
    """

    a: jax.Array
    b: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """(*L, N, K)."""
        return (*self.b.shape[:-1], self.a.shape[-1])


@dequantize.register
def _(w: LowRank, dtype=jnp.float32) -> jax.Array:
    matrix = jnp.matmul(w.b.astype(jnp.float32), w.a.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return (matrix * w.scale[..., None, None]).astype(dtype)


@product.register
def _(w: LowRank, x, backend=None):
    b = (w.b.astype(jnp.float32) * w.scale).astype(x.dtype)
    return dense_product(dense_product(x, w.a.astype(x.dtype)), b)


@take_rows.register
def _(w: LowRank, rows):
    return dataclasses.replace(w, b=take_rows(w.b, rows))
