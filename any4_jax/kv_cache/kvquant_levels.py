"""Learns what a KVQuant cache needs of a model: the levels of keys and values of a block, and the ranges of channels.

Letters as in `kv_cache.base`; N sampled tokens, C = Hkv * D channels, O slots for the outliers of a token.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from any4_jax.clustering import kmeans_1d
from any4_jax.kv_cache.nonuniform import Levels, key_slots, nearest, value_slots

# The clustering sees this many values at most, each the mean of a bin. The bins are uniform over LIMIT in both
# directions, where numbers within their range are from -1 to 1; what lies farther out belongs to the outermost bins.
BINS = 4096
LIMIT = 2.0


class CacheSample(NamedTuple):
    """Keys and values of sampled tokens in one block, from the model without a cache's errors.

    Attributes:
        keys, values: float32 [N, Hkv, D], keys before their rotation.
        key_weights, value_weights: of the same shape: what an error of each number costs, relative to the others; None
            if that is not known.
    """

    keys: jax.Array
    values: jax.Array
    key_weights: jax.Array | None = None
    value_weights: jax.Array | None = None


@functools.partial(jax.jit, static_argnames=("bits", "slots", "share", "refits"))
def learned(sample: CacheSample, *, bits: int, slots: int, share: float, refits: int) -> Levels:
    """The levels of one block.

    A level is the weighted mean of the numbers that it stands for, and no other levels have a smaller weighted error
    (exact k-means): an error dz of a number with the weight w in a range of the scale s costs w (s dz)^2, or dz^2 if
    there are no weights. Numbers in slots have none.

    Args:
        sample: of the block.
        bits: of the codes.
        slots: O.
        share: of outliers; a channel's range is from the quantile share / 2 to 1 - share / 2.
        refits: how many times each channel's scale and offset are fitted to its numbers (least squares), and the
            levels learned again.
    """
    keys, values = (x.reshape(x.shape[0], -1).astype(jnp.float32) for x in (sample.keys, sample.values))
    ends = jnp.quantile(keys, jnp.asarray([share / 2, 1 - share / 2], jnp.float32), axis=0)
    first = (ends[1] - ends[0]) * 0.5, (ends[1] + ends[0]) * 0.5

    def learn_keys(scales: jax.Array, offsets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        z, channels = key_slots(keys, scales, offsets, slots)
        inside = _outside_slots(z, channels)
        return _clustered(z, _costs(sample.key_weights, scales[None], z) * inside, bits), z, inside

    def refit(_: jax.Array, known: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        levels, scales, offsets = known
        _, z, inside = learn_keys(scales, offsets)
        decoded = jnp.take(levels, nearest(z, levels).astype(jnp.int32), mode="clip")
        scales, offsets = _fitted(keys, decoded, inside, scales, offsets)
        return learn_keys(scales, offsets)[0], scales, offsets

    scales, offsets = jnp.maximum(first[0], jnp.finfo(jnp.float32).tiny), first[1]
    known = learn_keys(scales, offsets)[0], scales, offsets
    of_keys, scales, offsets = jax.lax.fori_loop(0, refits, refit, known) if refits else known

    z, ranges, channels = value_slots(values, slots, jnp.float32)
    cost = _costs(sample.value_weights, ranges[:, :1], z) * _outside_slots(z, channels)
    shape = sample.keys.shape[1:]
    return Levels(of_keys, scales.reshape(shape), offsets.reshape(shape), _clustered(z, cost, bits))


def _outside_slots(z: jax.Array, channels: jax.Array) -> jax.Array:
    """float32 [N, C], 0 for the numbers in the slots of their token and 1 for others."""
    token = jnp.arange(z.shape[0], dtype=jnp.int32)[:, None]
    return jnp.ones_like(z).at[token, channels].set(0.0)


def _costs(weights: jax.Array | None, scales: jax.Array, z: jax.Array) -> jax.Array:
    """What dz = 1 costs, [N, C]; the largest is at most 1."""
    if weights is None:
        return jnp.ones_like(z)
    costs = weights.reshape(z.shape).astype(jnp.float32) * (scales / scales.max()) ** 2
    most = costs.max()
    return jnp.where(most > 0, costs / jnp.where(most > 0, most, 1.0), 1.0)


def _clustered(z: jax.Array, costs: jax.Array, bits: int) -> jax.Array:
    """The levels [2^bits] of numbers z and their costs, [N, C]."""
    bins = jnp.clip((z + LIMIT) * (BINS / (2 * LIMIT)), 0, BINS - 1).astype(jnp.int32).reshape(-1)
    total = jnp.zeros(BINS, jnp.float32).at[bins].add(costs.reshape(-1))
    sums = jnp.zeros(BINS, jnp.float32).at[bins].add((costs * z).reshape(-1))
    centres = (jnp.arange(BINS, dtype=jnp.float32) + 0.5) * (2 * LIMIT / BINS) - LIMIT
    means = jnp.where(total > 0, sums / jnp.where(total > 0, total, 1.0), centres)
    return kmeans_1d(means[None], 2**bits, sample_weight=total[None]).centroids[0]


def _fitted(
    x: jax.Array, levels: jax.Array, inside: jax.Array, scales: jax.Array, offsets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The scale and offset of each channel, [C], with which scale * level + offset is nearest to its numbers x [N, C];
    where the levels of a channel don't differ, those that it has."""
    total = jnp.maximum(inside.sum(axis=0), 1.0)
    mean_x, mean_level = ((y * inside).sum(axis=0) / total for y in (x, levels))
    apart = (levels - mean_level[None]) * inside
    spread = (apart * apart).sum(axis=0)
    slope = (apart * (x - mean_x[None])).sum(axis=0) / jnp.where(spread > 0, spread, 1.0)
    good = (spread > 0) & (slope > jnp.finfo(jnp.float32).tiny)
    return jnp.where(good, slope, scales), jnp.where(good, mean_x - slope * mean_level, offsets)
