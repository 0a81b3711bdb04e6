"""Running statistics of the activations that enter a linear layer.

Activations are never kept: each batch is reduced to a few vectors of length K and added to running sums. The sums
are compensated (Neumaier), so that millions of tokens in float32 don't drift.
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
    """

    count: Any
    sums: Any
    lost: Any
    absmax: Any

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


jax.tree_util.register_dataclass(Statistics, ["count", "sums", "lost", "absmax"], [])


def empty(k: int) -> Statistics:
    """Statistics of no tokens, for inputs of K = `k` features (host arrays, so that nothing is compiled)."""
    return Statistics(np.int32(0), np.zeros((3, k), np.float32), np.zeros((3, k), np.float32), np.zeros(k, np.float32))


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
    return Statistics(count, sums, lost, jnp.maximum(stats.absmax, jnp.abs(x).max(axis=0, initial=0.0)))


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Statistics of the tokens of both."""
    sums, lost = _add(a.sums, a.lost + b.lost, b.sums)
    return Statistics(a.count + b.count, sums, lost, jnp.maximum(a.absmax, b.absmax))


def from_activations(x: jax.Array, mask: jax.Array | None = None) -> Statistics:
    """Statistics of activations in hand, x [..., K]; see `update` for the mask."""
    return update(empty(x.shape[-1]), x, mask)


def _add(sums, lost, values) -> tuple[jax.Array, jax.Array]:
    total = sums + values
    larger = jnp.abs(sums) >= jnp.abs(values)
    error = jnp.where(larger, (sums - total) + values, (values - total) + sums)
    return total, lost + error
