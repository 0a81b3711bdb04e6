"""How far the inputs of a linear are from those of the float model."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.pytree import register_dataclass


@register_dataclass
@dataclasses.dataclass(frozen=True)
class DriftSum:
    """The running sum of (x_float - x) x^T over `count` tokens.

    Attributes:
      count: int32 [], tokens seen.
      sum: float32 [K, K].
    """

    count: Any
    sum: Any

    @property
    def mean(self) -> jax.Array:
        """E[(x_float - x) x^T], float32 [K, K]. With a Hessian H = E[x x^T], the row of weights w + w E[...] H^-1 gives
        for x what w gives for x_float, as far as a linear map of x can (GPTAQ, arXiv 2504.02692)."""
        return self.sum / jnp.maximum(self.count, 1).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Drift:
    """The mean of (x_float - x) x^T, where x_float is what the float model has in place of x.

    It is zero where x is the float model's own input. Products are in float32 at Precision.HIGHEST, as in `Hessian`.
    """

    paired: ClassVar[bool] = True

    def empty(self, k: int) -> DriftSum:
        return DriftSum(np.int32(0), np.zeros((k, k), np.float32))

    def update(
        self, accumulator: DriftSum, x: jax.Array, mask: jax.Array, x_float: jax.Array | None = None
    ) -> DriftSum:
        gap = jnp.zeros_like(x) if x_float is None else x_float - x
        product = jax.lax.dot_general(gap, x, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
        return DriftSum(accumulator.count + mask.sum(dtype=jnp.int32), accumulator.sum + product)

    def merge(self, a: DriftSum, b: DriftSum) -> DriftSum:
        return DriftSum(a.count + b.count, a.sum + b.sum)

    def scaled(self, accumulator: DriftSum, factor: jax.Array) -> DriftSum:
        return DriftSum(accumulator.count, accumulator.sum * (factor[:, None] * factor))

    def possible(self, accumulator: DriftSum) -> jax.Array:
        return (accumulator.count >= 0).all()
