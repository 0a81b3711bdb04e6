"""Means over tokens, and the largest magnitude, for each feature."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.pytree import register_dataclass


@register_dataclass
@dataclasses.dataclass(frozen=True)
class MomentSums:
    """Running sums of x, |x| and x^2 over `count` tokens.

    Attributes:
      count: int32 [], tokens seen.
      sums: float32 [3, K].
      lost: float32 [3, K], what rounding has taken from `sums` so far.
    """

    count: Any
    sums: Any
    lost: Any

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


@dataclasses.dataclass(frozen=True)
class Moments:
    """Means of x, |x| and x^2. The float32 sums are compensated (Neumaier), so that they don't drift over millions of
    tokens."""

    def empty(self, k: int) -> MomentSums:
        return MomentSums(np.int32(0), np.zeros((3, k), np.float32), np.zeros((3, k), np.float32))

    def update(self, accumulator: MomentSums, x: jax.Array, mask: jax.Array) -> MomentSums:
        batch = jnp.stack([x.sum(axis=0), jnp.abs(x).sum(axis=0), (x * x).sum(axis=0)])
        sums, lost = _add(accumulator.sums, accumulator.lost, batch)
        return MomentSums(accumulator.count + mask.sum(dtype=jnp.int32), sums, lost)

    def merge(self, a: MomentSums, b: MomentSums) -> MomentSums:
        return MomentSums(a.count + b.count, *_add(a.sums, a.lost + b.lost, b.sums))

    def scaled(self, accumulator: MomentSums, factor: jax.Array) -> MomentSums:
        powers = jnp.stack([factor, factor, factor * factor])
        return MomentSums(accumulator.count, accumulator.sums * powers, accumulator.lost * powers)

    def possible(self, accumulator: MomentSums) -> jax.Array:
        totals = jnp.moveaxis(accumulator.sums + accumulator.lost, -2, 0)
        return (accumulator.count >= 0).all() & (totals[1:] >= 0).all()


@dataclasses.dataclass(frozen=True)
class AbsMax:
    """The largest |x| of each feature, float32 [K]."""

    def empty(self, k: int) -> np.ndarray:
        return np.zeros(k, np.float32)

    def update(self, accumulator: jax.Array, x: jax.Array, mask: jax.Array) -> jax.Array:
        del mask  # the tokens that don't count are zeros
        return jnp.maximum(accumulator, jnp.abs(x).max(axis=0, initial=0.0))

    def merge(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.maximum(a, b)

    def scaled(self, accumulator: jax.Array, factor: jax.Array) -> jax.Array:
        return accumulator * factor

    def possible(self, accumulator: jax.Array) -> jax.Array:
        return (accumulator >= 0).all()


def _add(sums, lost, values) -> tuple[jax.Array, jax.Array]:
    total = sums + values
    larger = jnp.abs(sums) >= jnp.abs(values)
    error = jnp.where(larger, (sums - total) + values, (values - total) + sums)
    return total, lost + error
