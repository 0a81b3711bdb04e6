"""Optimal weighted k-means of a sorted row by dynamic programming, with shapes independent of the data.

best[m][j] is the least error of the values 0..j in at most m clusters; with e(i, j) the error of the interval
[i, j]

    best[m][j] = min over i <= j of best[m - 1][i - 1] + e(i, j)

e satisfies the quadrangle inequality, so the smallest minimising i never decreases with j (Wu, "Optimal
quantization by matrix searching", 1991; Gronlund et al., "Fast exact k-means, k-medians and Bregman
divergence clustering in 1D", 2017). It is used in stages of ever finer positions: when the minimisers at the
ends of all blocks are known, those inside block b lie between its neighbours', and a staircase of at most 2 *
blocks square tiles (b, a) covers every candidate. A stage costs O(16 P), a layer O(P log P), and each tile is
dense arithmetic.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .intervals import Intervals, Moments, cut_level, join_error, weight_and_mean


class Stage(NamedTuple):
    """Blocks of `parts` sub-blocks of `size` values; it finds the minimisers at the sub-blocks' ends."""

    parts: int
    size: int


def plan(length: int) -> tuple[Stage, ...]:
    """Stages for a row of `length` values, coarse to fine; the last has size 1.

    No stage has more than 16 parts: a stage's cost grows with its parts and the number of stages shrinks with
    log(parts).
    """
    bits = max((length - 1).bit_length(), 1)
    below = max(bits - 4, 0)
    stages = [Stage(-(-max(length, 2) // (1 << below)), 1 << below)]
    count = -(-below // 4)
    for index in range(count):
        step = -(-below // (count - index))
        below -= step
        stages.append(Stage(1 << step, 1 << below))
    return tuple(stages)


def _own_errors(table: Intervals, stage: Stage, length: int) -> jax.Array:
    """e(i, j) for candidates i and positions j of the same block: [parts of i, blocks, parts of j, size]."""
    parts, size = stage
    shape = (length // (parts * size), parts, size)
    base = size.bit_length() - 1

    def candidates(m: jax.Array) -> jax.Array:
        return jnp.swapaxes(m[:length].reshape(shape), 0, 1)[:, :, None, :]

    def positions(m: jax.Array) -> jax.Array:
        return m[:length].reshape(shape)[None, :, :, -1:]

    i, j = np.arange(parts)[:, None, None, None], np.arange(parts)[None, None, :, None]
    errors = jnp.where(i == j, candidates(table.tail_error[base]), jnp.inf)
    for bit in range((parts - 1).bit_length()):
        here = ((i ^ j) >> bit == 1) & (i < j)
        cut = Moments(*(m[base + bit] for m in table.cut))
        left, right = Moments(*map(candidates, cut)), Moments(*map(positions, cut))
        errors = jnp.where(here, left.error + right.error + join_error(left, right), errors)
    return errors


def _lanes_min(value: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Minimum over the last axis and the smallest index that attains it."""
    least = jnp.min(value, -1)
    return least, jnp.min(jnp.where(value == least[..., None], index, jnp.iinfo(jnp.int32).max), -1)


def _own_minimum(stage: Stage, own: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Minimum and minimiser over the candidates of each position's own block: [blocks, parts] each."""
    parts, size = stage
    blocks = own.shape[1]
    before = before.reshape(blocks, parts, size)
    value = own[0] + before[:, 0, None, :]
    part = jnp.zeros(value.shape, jnp.int32)
    for p in range(1, parts):
        new = own[p] + before[:, p, None, :]
        part = jnp.where(new < value, p, part)
        value = jnp.minimum(new, value)
    start = jnp.arange(blocks, dtype=jnp.int32)[:, None, None] * (parts * size)
    return _lanes_min(value, start + part * size + jnp.arange(size, dtype=jnp.int32))


def _tile_minimum(stage: Stage, cut: Moments, before: jax.Array, ends: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Minimum and minimiser over the candidates of earlier blocks within the bounds: [blocks, parts] each.

    cut: Moments [levels, length].  before: [length].  ends: [blocks], non-decreasing minimisers at the
    blocks' ends. The minimum is infinite where no earlier block is within the bounds.
    """
    parts, size = stage
    width = parts * size
    length = before.shape[0]
    blocks = length // width
    # Tile (b, a) has number a + b: a block's first tile is in the column of the previous block's last one, so
    # that each number is used by exactly one tile of the staircase.
    last_tile = ends // width + jnp.arange(blocks, dtype=jnp.int32)
    tile = jnp.arange(2 * blocks - 1, dtype=jnp.int32)
    b = jnp.minimum(jnp.searchsorted(last_tile, tile).astype(jnp.int32), blocks - 1)
    a = jnp.clip(tile - b, 0, blocks - 1)
    row = (cut_level(a, b) + (width.bit_length() - 1)) * blocks
    table = [m.reshape(-1, parts, size) for m in cut]
    ends_only = [m[:, :, -1] for m in table]
    left = Moments(*(m[row + a] for m in table))
    right = Moments(*(m[row + b][:, :, None] for m in ends_only))
    constant = jnp.where((a < b)[:, None, None], before.reshape(blocks, parts, size)[a] + left.error, jnp.inf)

    # A loop whose operands XLA gathers once; unrolled in full, it compiles slower and repeats the gathers.
    def add_part(p: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        value, part = found
        here = Moments(*(jax.lax.dynamic_index_in_dim(m, p, 1) for m in left))
        new = jax.lax.dynamic_index_in_dim(constant, p, 1) + join_error(here, right)
        return jnp.minimum(new, value), jnp.where(new < value, p, part)

    nothing = (jnp.full((tile.size, parts, size), jnp.inf), jnp.zeros((tile.size, parts, size), jnp.int32))
    value, part = jax.lax.fori_loop(0, parts, add_part, nothing, unroll=min(4, parts))
    index = a[:, None, None] * width + part * size + jnp.arange(size, dtype=jnp.int32)
    least, index = _lanes_min(value, index)
    least = least + right.error[..., 0]

    # Running minimum over the tiles of one block; the last of them then holds the block's. A loop in the
    # program, since XLA would fuse unrolled doublings and recompute each in the next.
    def double(power: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        least, index = found
        step = 1 << power

        def earlier(values: jax.Array, fill: float) -> jax.Array:
            padded = jnp.pad(values, ((blocks, 0),) + ((0, 0),) * (values.ndim - 1), constant_values=fill)
            return jax.lax.dynamic_slice_in_dim(padded, blocks - step, values.shape[0])

        before_least, before_index = earlier(least, jnp.inf), earlier(index, 0)
        take = (earlier(b, -1) == b)[:, None] & (before_least <= least)
        return jnp.where(take, before_least, least), jnp.where(take, before_index, index)

    least, index = jax.lax.fori_loop(0, (blocks - 1).bit_length(), double, (least, index))
    return least[last_tile], index[last_tile]


def _minimiser(table: Intervals, before: jax.Array, last: jax.Array) -> jax.Array:
    """Smallest i that minimises before[i] + e(i, last): int32 scalar, over all candidates."""
    i = jnp.arange(before.shape[0], dtype=jnp.int32)
    level = cut_level(i, last)
    left = Moments(*(m[0, : i.size] for m in table.cut))
    right = Moments(*(jnp.full(i.shape, m[0, last]) for m in table.cut))
    for row in range(1, table.cut.error.shape[0]):
        left = Moments(*(jnp.where(level == row, m[row, : i.size], v) for m, v in zip(table.cut, left, strict=True)))
        right = Moments(*(jnp.where(level == row, m[row, last], v) for m, v in zip(table.cut, right, strict=True)))
    error = jnp.where(i == last, 0.0, left.error + right.error + join_error(left, right))
    total = jnp.where(i <= last, before + error, jnp.inf)
    return jnp.min(jnp.where(total == jnp.min(total), i, i.size)).astype(jnp.int32)


def _shift(best: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.zeros((1,), best.dtype), best[:-1]])


def exact_centroids(table: Intervals, length: int, k: int) -> jax.Array:
    """Centroids [k] float32, ascending, of an optimal clustering of the first `length` values of the table's
    row.

    Values past `length` must have no weight. Where fewer than k clusters are needed, the first centroid is
    repeated.
    """
    stages = plan(length)
    length = stages[0].parts * stages[0].size
    cut = Moments(*(m[:, :length] for m in table.cut))
    own = [_own_errors(table, stage, length) for stage in stages]

    def layer(best: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        before = _shift(best)
        value, index = _own_minimum(stages[0], own[0], before)
        for stage, errors in zip(stages[1:], own[1:], strict=True):
            # Rounding can put equal minima out of order; the running maximum restores the bound.
            ends = jax.lax.cummax(index.reshape(-1))
            value, index = _own_minimum(stage, errors, before)
            tile_value, tile_index = _tile_minimum(stage, cut, before, ends)
            index = jnp.where(tile_value <= value, tile_index, index)
            value = jnp.minimum(tile_value, value)
        return value.reshape(-1), best

    def cluster(last: jax.Array, best: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        first = jnp.where(last < 0, 0, _minimiser(table, _shift(best), jnp.maximum(last, 0)))
        return first - 1, (first, last)

    end = jnp.int32(length - 1)
    if k > 1:
        best, earlier = jax.lax.scan(layer, table.head.error[:length], None, length=k - 2)
        layers = jnp.concatenate([earlier, best[None]])
        end, (first, last) = jax.lax.scan(cluster, end, layers, reverse=True)
        first, last = jnp.append(0, first), jnp.append(end, last)
    else:
        first, last = jnp.zeros((1,), jnp.int32), end[None]
    _, mean = weight_and_mean(table, first, last)
    lowest = jnp.min(jnp.where(last < first, jnp.inf, mean))
    return jnp.sort(jnp.where(last < first, lowest, mean))
