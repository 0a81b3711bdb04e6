"""Products of features: the Hessian of a linear's squared output error with respect to its weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.pytree import register_dataclass


@register_dataclass
@dataclasses.dataclass(frozen=True)
class HessianSum:
    """The running sum of x x^T over `count` tokens.

    Attributes:
      count: int32 [], tokens seen.
      sum: float32 [K, K], symmetric to the last bit.
    """

    count: Any
    sum: Any

    @property
    def mean(self) -> jax.Array:
        """The mean of x x^T, float32 [K, K]: half of the Hessian of sum_n (w_n - w^_n)^T E[x x^T] (w_n - w^_n) with
        respect to a row of weights (GPTQ, arXiv 2210.17323, eq. 1; OBQ, arXiv 2208.11580)."""
        return self.sum / jnp.maximum(self.count, 1).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Hessian:
    """The mean of x x^T.

    Products are in float32 at Precision.HIGHEST. In TF32, a GPU's default, the small eigenvalues by which error
    compensation divides would be noise.
    """

    def empty(self, k: int) -> HessianSum:
        return HessianSum(np.int32(0), np.zeros((k, k), np.float32))

    def update(self, accumulator: HessianSum, x: jax.Array, mask: jax.Array) -> HessianSum:
        product = jax.lax.dot_general(x, x, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
        # A blocked product sums the entries (i, j) and (j, i) in different orders.
        product = (product + product.T) / 2
        return HessianSum(accumulator.count + mask.sum(dtype=jnp.int32), accumulator.sum + product)

    def merge(self, a: HessianSum, b: HessianSum) -> HessianSum:
        return HessianSum(a.count + b.count, a.sum + b.sum)

    def scaled(self, accumulator: HessianSum, factor: jax.Array) -> HessianSum:
        return HessianSum(accumulator.count, accumulator.sum * (factor[:, None] * factor))

    def possible(self, accumulator: HessianSum) -> jax.Array:
        squares = jnp.diagonal(accumulator.sum, axis1=-2, axis2=-1)
        return (accumulator.count >= 0).all() & (squares >= 0).all()
