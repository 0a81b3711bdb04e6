"""A sample of the tokens themselves."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.pytree import register_dataclass

_UNDRAWN = np.uint32(0xFFFFFFFF)
"""The draw of a free place in the sample, and of tokens that don't count."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class SampledTokens:
    """Tokens drawn uniformly from all that were seen.

    Attributes:
      count: int32 [], tokens seen.
      x: float32 [S, K], the sample; zeros where fewer than S tokens were seen.
      draws: uint32 [S], the numbers that these tokens drew, which are the S smallest of all.
    """

    count: Any
    x: Any
    draws: Any


@dataclasses.dataclass(frozen=True)
class Sample:
    """The inputs x of `tokens` tokens. Which are drawn depends on their places among the tokens that count, not on how
    tokens are batched.

    Attributes:
      tokens: S, the size of the sample.
    """

    tokens: int

    def empty(self, k: int) -> SampledTokens:
        return SampledTokens(np.int32(0), np.zeros((self.tokens, k), np.float32), np.full(self.tokens, _UNDRAWN))

    def update(self, accumulator: SampledTokens, x: jax.Array, mask: jax.Array) -> SampledTokens:
        place = accumulator.count + jnp.cumsum(mask, dtype=jnp.int32)
        draws = jnp.where(mask, _hash(place), _UNDRAWN)
        return self._smallest(accumulator, x, draws, accumulator.count + mask.sum(dtype=jnp.int32))

    def merge(self, a: SampledTokens, b: SampledTokens) -> SampledTokens:
        return self._smallest(a, b.x, b.draws, a.count + b.count)

    def scaled(self, accumulator: SampledTokens, factor: jax.Array) -> SampledTokens:
        return dataclasses.replace(accumulator, x=accumulator.x * factor)

    def possible(self, accumulator: SampledTokens) -> jax.Array:
        return (accumulator.count >= 0).all()

    def _smallest(self, sampled: SampledTokens, x: jax.Array, draws: jax.Array, count: jax.Array) -> SampledTokens:
        every = jnp.concatenate([sampled.draws, draws])
        chosen = jnp.argsort(every, stable=True)[: self.tokens]
        return SampledTokens(count, jnp.concatenate([sampled.x, x])[chosen], every[chosen])


def _hash(index: jax.Array) -> jax.Array:
    """A bijection of 32-bit integers whose values look random (the finaliser of MurmurHash3, public domain)."""
    h = index.astype(jnp.uint32)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
