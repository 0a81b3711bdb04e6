"""Running statistics of the activations that enter a linear layer.

Each batch is reduced to a few vectors of length K and added to running sums, which are compensated (Neumaier), so that
millions of tokens in float32 don't drift. Activations themselves are kept for a sample of tokens at most, where a
method asks for one.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What is known of the input of one linear layer, over `count` tokens.

    Attributes:
      count: int32 scalar, tokens seen (padding excluded).
      sums: float32 [3, K]: running sums of x, |x| and x^2.
      lost: float32 [3, K]: what rounding took from `sums` so far.
      absmax: float32 [K]: the largest |x|.
      sample: float32 [S, K]: x of S tokens, drawn evenly from all; zeros where there were fewer. S is 0 but for
        methods that need some (`Method.samples`).
      draws: uint32 [S]: the numbers that the sample's tokens drew; the S least of all are kept.
    """

    count: Any
    sums: Any
    lost: Any
    absmax: Any
    sample: Any
    draws: Any

    def _mean(self, row: int) -> jax.Array:
        return (self.sums[row] + self.lost[row]) / jnp.maximum(self.count, 1).astype(jnp.float32)

    @property
    def mean(self) -> jax.Array:
        """Mean of x, float32 [K]."""
        return self._mean(0)

    @property
    def mean_abs(self) -> jax.Array:
        """Mean of |x|, float32 [K]."""
        return self._mean(1)

    @property
    def second_moment(self) -> jax.Array:
        """Mean of x^2, float32 [K]."""
        return self._mean(2)


jax.tree_util.register_dataclass(Statistics, ["count", "sums", "lost", "absmax", "sample", "draws"], [])

_UNDRAWN = np.uint32(0xFFFFFFFF)
"""The draw of a place in the sample that no token has taken, and of padding."""


def empty(k: int, samples: int = 0) -> Statistics:
    """Statistics of no tokens, for inputs of K = `k` features, with room for a sample of so many tokens (host arrays,
    so that nothing is compiled)."""
    sums = np.zeros((3, k), np.float32)
    sample, draws = np.zeros((samples, k), np.float32), np.full(samples, _UNDRAWN)
    return Statistics(np.int32(0), sums, sums.copy(), np.zeros(k, np.float32), sample, draws)


def update(stats: Statistics, x: jax.Array, mask: jax.Array | None = None) -> Statistics:
    """Adds tokens.

    Args:
      x: [..., K], any float dtype; reduced in float32.
      mask: [...] bool, False for tokens to leave out (padding); None counts all.
    """
    x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    keep = jnp.ones(x.shape[0], bool) if mask is None else mask.reshape(-1)
    x = jnp.where(keep[:, None], x, 0.0)
    batch = jnp.stack([x.sum(axis=0), jnp.abs(x).sum(axis=0), (x * x).sum(axis=0)])
    sums, lost = _add(stats.sums, stats.lost, batch)
    count = stats.count + keep.sum(dtype=jnp.int32)
    # A token's draw is a hash of its place among all counted ones, so that how tokens are batched changes nothing.
    draws = jnp.where(keep, _hash(stats.count + jnp.cumsum(keep, dtype=jnp.int32)), _UNDRAWN)
    absmax = jnp.maximum(stats.absmax, jnp.abs(x).max(axis=0, initial=0.0))
    return Statistics(count, sums, lost, absmax, *_least(stats, x, draws))


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Statistics of the tokens of both, with a sample of a's size."""
    sums, lost = _add(a.sums, a.lost + b.lost, b.sums)
    sample, draws = _least(a, b.sample, b.draws)
    return Statistics(a.count + b.count, sums, lost, jnp.maximum(a.absmax, b.absmax), sample, draws)


def _least(stats: Statistics, x: jax.Array, draws: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sample after tokens x [T, K] with their draws."""
    size = stats.draws.shape[0]
    if size == 0:
        return stats.sample, stats.draws
    every = jnp.concatenate([stats.draws, draws])
    chosen = jnp.argsort(every, stable=True)[:size]
    return jnp.concatenate([stats.sample, x])[chosen], every[chosen]


def _hash(index: jax.Array) -> jax.Array:
    """A bijection of 32-bit integers whose values look random (the finaliser of MurmurHash3, public domain)."""
    h = index.astype(jnp.uint32)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def from_activations(x: jax.Array, mask: jax.Array | None = None, *, samples: int = 0) -> Statistics:
    """Statistics of activations in hand, x [..., K], with a sample of so many tokens; see `update` for the mask."""
    return update(empty(x.shape[-1], samples), x, mask)


def _add(sums, lost, values) -> tuple[jax.Array, jax.Array]:
    total = sums + values
    larger = jnp.abs(sums) >= jnp.abs(values)
    error = jnp.where(larger, (sums - total) + values, (values - total) + sums)
    return total, lost + error
