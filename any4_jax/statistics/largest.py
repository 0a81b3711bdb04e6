"""The largest of the tokens."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.pytree import register_dataclass


@register_dataclass
@dataclasses.dataclass(frozen=True)
class LargestTokens:
    """The tokens with the largest squares.

    Attributes:
      count: int32 [], tokens seen.
      x: float32 [S, K], from the largest on; zeros where fewer than S tokens were seen.
    """

    count: Any
    x: Any


@dataclasses.dataclass(frozen=True)
class Largest:
    """The inputs x of the `tokens` tokens whose sum of squares is largest. A few tokens, such as the first of a text,
    can have inputs hundreds of times as large as the others, and a sample drawn by chance is likely to have none.

    Attributes:
      tokens: S, how many are kept.
    """

    tokens: int

    def empty(self, k: int) -> LargestTokens:
        return LargestTokens(np.int32(0), np.zeros((self.tokens, k), np.float32))

    def update(self, accumulator: LargestTokens, x: jax.Array, mask: jax.Array) -> LargestTokens:
        # The tokens that don't count are zeros, which come last.
        return self._largest(accumulator, x, accumulator.count + mask.sum(dtype=jnp.int32))

    def merge(self, a: LargestTokens, b: LargestTokens) -> LargestTokens:
        return self._largest(a, b.x, a.count + b.count)

    def scaled(self, accumulator: LargestTokens, factor: jax.Array) -> LargestTokens:
        return dataclasses.replace(accumulator, x=accumulator.x * factor)

    def possible(self, accumulator: LargestTokens) -> jax.Array:
        return (accumulator.count >= 0).all()

    def _largest(self, kept: LargestTokens, x: jax.Array, count: jax.Array) -> LargestTokens:
        every = jnp.concatenate([kept.x, x.astype(jnp.float32)])
        chosen = jnp.argsort(-sizes(every), stable=True)[: self.tokens]
        return LargestTokens(count, every[chosen])


def sizes(x: jax.Array) -> jax.Array:
    """The sum of squares of each token: x [T, K] -> float32 [T]."""
    return jnp.square(x).sum(axis=1)
