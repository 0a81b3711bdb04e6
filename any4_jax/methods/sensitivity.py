"""What it costs to quantize a weight, and which weights of a group cost too much (SpQR, arXiv 2306.03078)."""

import jax
import jax.numpy as jnp

from any4_jax.methods.columns import Columns


def column_costs(given: Columns) -> jax.Array:
    """By how much the error of the output grows for a weight's squared error, for columns in sequence: R_ii^2, float32
    [K], where H = R R^T with R upper triangular. For inputs that were always zero it is 0."""
    alive = given.energy[given.order] > 0
    return jnp.where(alive, jnp.square(given.factored.pivots), 0.0)


def mean_cost(w: jax.Array, costs: jax.Array) -> jax.Array:
    """The mean over the columns of w [N, K] of costs [K] times the variance of their weights; columns that cost nothing
    don't count. float32 []."""
    rows = max(w.shape[0] - 1, 1)
    variance = jnp.square(w - w.mean(axis=0, keepdims=True)).sum(axis=0) / rows
    return (variance * costs).sum() / jnp.maximum((costs > 0).sum(), 1).astype(jnp.float32)


def without_outliers(groups: jax.Array, costs: jax.Array, limit: jax.Array, bits: int) -> jax.Array:
    """Groups of weights, with those that are likely to become outliers replaced by the mean of the others.

    They are those without which integers with a float minimum, scaled by the extremes of the rest, would quantize the
    rest so much better that the cost falls by more than `limit`.

    Args:
      groups: float32 [..., G].
      costs: of each weight's squared error, float32 [..., G], axes of 1 included.
      limit: float32 [].
      bits: of the integers.
    """
    size = groups.shape[-1]
    if size == 1:
        return groups
    ascending = jnp.sort(groups, axis=-1)
    low, high = ascending[..., :1], ascending[..., -1:]
    costs = jnp.broadcast_to(costs, groups.shape)

    def lost(low: jax.Array, high: jax.Array) -> jax.Array:
        """The costs of all weights [..., G] on the integers of a range."""
        step = (high - low) / (2**bits - 1)
        codes = jnp.round((groups - low) / jnp.where(step == 0, 1.0, step))
        return costs * jnp.square(low + step * jnp.clip(codes, 0, 2**bits - 1) - groups)

    whole = lost(low, high).sum(axis=-1)

    def gain(i: jax.Array) -> jax.Array:
        one = jax.lax.dynamic_slice_in_dim(groups, i, 1, axis=-1)
        rest = lost(
            jnp.where(one == low, ascending[..., 1:2], low), jnp.where(one == high, ascending[..., -2:-1], high)
        )
        return whole - jnp.where(jnp.arange(size) == i, 0.0, rest).sum(axis=-1)

    gains = jnp.moveaxis(jax.lax.map(gain, jnp.arange(size)), 0, -1)
    likely = gains > limit
    others = jnp.maximum((~likely).sum(axis=-1, keepdims=True), 1).astype(jnp.float32)
    mean = jnp.where(likely, 0.0, groups).sum(axis=-1, keepdims=True) / others
    return jnp.where(likely, mean, groups)
