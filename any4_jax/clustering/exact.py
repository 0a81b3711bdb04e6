"""Optimal weighted k-means of a sorted row by dynamic programming, with shapes independent of the data.

best[m][j] is the least error of the values 0..j in at most m clusters; with e(i, j) the error of the interval [i, j]

    best[m][j] = min over i <= j of best[m - 1][i - 1] + e(i, j)

e satisfies the quadrangle inequality, so the smallest minimising i never decreases with j (Wu, "Optimal quantization
by matrix searching", 1991; Gronlund et al., "Fast exact k-means, k-medians and Bregman divergence clustering in 1D",
2017). The row is cut into blocks of B values. When the minimisers at the ends of all blocks are known, those inside
block b lie between its neighbours', and a staircase of fewer than 2 * P / B square tiles (block of j, block of i)
covers every candidate. A layer costs P * P / B additions for the ends and 2 * P * B errors for the tiles, all dense
arithmetic. Wu's method takes O(P), but its memory accesses depend on one another and don't vectorise.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from any4_jax.clustering.intervals import Intervals, cut_level, join_error, weight_and_mean


def block_size(length: int) -> int:
    """B for a row of `length` values: a power of two of about sqrt(length) / 2, which balances the two costs."""
    return 1 << (length - 1).bit_length() // 2


def _errors(lefts: jax.Array, rights: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
    """Errors of the intervals from element `first` to element `last`: the indices' broadcast shape.

    lefts, rights: [levels, 3, ...], moments of first and of last at the levels at which these elements are joined; they
    broadcast. The error is infinite where first > last, and meaningless where they are equal.
    """
    level = cut_level(first, last)
    left, right = lefts[0], rights[0]
    for row in range(1, lefts.shape[0]):
        left = jnp.where(level == row, lefts[row], left)
        right = jnp.where(level == row, rights[row], right)
    return jnp.where(first <= last, join_error(left, right), jnp.inf)


def _block_errors(cut: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Errors e(i, j) within a block [blocks, B, B], and e(i, end of block b) [B, block of i, b].

    cut: [levels, 3, blocks, B]. The order of the second's axes lets a minimum over i run along vectors of b.
    """
    levels, _, blocks, size = cut.shape
    inside = size.bit_length() - 1
    i, block = jnp.arange(size, dtype=jnp.int32), jnp.arange(blocks, dtype=jnp.int32)
    low, high = cut[: max(inside, 1)], cut[min(inside, levels - 1) :]
    own = _errors(low[..., None], low[:, :, :, None], i[:, None], i)
    own = jnp.where(i[:, None] == i, 0.0, own)
    a, b = block[:, None], block[:, None, None]
    ends = _errors(high[:, :, None], high[:, :, :, None, -1:], a, b)
    ends = jnp.where(a == b, own[:, :, -1], ends)
    # The barrier makes XLA compute along vectors of i and transpose afterwards, not gather for each element.
    return own, jnp.transpose(jax.lax.optimization_barrier(ends), (2, 1, 0))


def _least(count: int, term: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Elementwise minimum of term(0), ..., term(count - 1).

    A loop over whole arrays, since XLA's reduction on a CPU takes one element at a time, which is two to three times
    slower. Unrolling more than four terms only takes longer to compile.
    """
    start = jnp.full(jax.eval_shape(term, jnp.int32(0)).shape, jnp.inf)
    return jax.lax.fori_loop(0, count, lambda i, least: jnp.minimum(least, term(i)), start, unroll=min(4, count))


def _tile_minimum(cut: jax.Array, before: jax.Array, ends: jax.Array, own: jax.Array) -> jax.Array:
    """Least of own and before[i] + e(i, j) over the i of earlier blocks within the bounds: [blocks, B] for every j.

    cut: [levels, 3, blocks, B].  before, own: [blocks, B].  ends: [blocks], non-decreasing, the
    blocks of the minimisers at the blocks' ends.
    """
    blocks, size = before.shape
    # Tile (b, a) has number a + b. A block's first tile is in the column of the previous block's last one, so at most
    # one tile of the staircase has each number.
    tile = jnp.arange(2 * blocks - 1, dtype=jnp.int32)
    last_tile = ends + tile[:blocks]
    b = jnp.minimum(jnp.sum((last_tile[:, None] < tile).astype(jnp.int32), 0), blocks - 1)
    a = jnp.clip(tile - b, 0, blocks - 1)
    row = (cut_level(a, b) + (size.bit_length() - 1)) * blocks
    flat = jnp.swapaxes(cut, 1, 2).reshape(-1, 3, size)
    left, right = flat[row + a], flat[row + b]
    constant = jnp.where((a < b)[:, None], before[a] + left[:, 2], jnp.inf)
    # wl * wr / (wl + wr) as 1 / (1 / wl + 1 / wr): half the work, and right for empty weights as well.
    # The barrier keeps the gathers out of the loop.
    fixed, varying = jax.lax.optimization_barrier(
        ((right[:, 1], 1 / right[:, 0]), jnp.stack([constant, left[:, 1], 1 / left[:, 0]]))
    )

    def candidate(i: jax.Array) -> jax.Array:
        start, distance, share = jax.lax.dynamic_index_in_dim(varying, i, 2)
        distance = distance + fixed[0]
        return start + distance * distance / (share + fixed[1])

    return own.at[b].min(_least(size, candidate) + right[:, 2], indices_are_sorted=True)


def _minimiser(cut: jax.Array, before: jax.Array, last: jax.Array) -> jax.Array:
    """Smallest i that minimises before[i] + e(i, last): int32 scalar. cut: [levels, 3, P], before: [P]."""
    i = jnp.arange(before.shape[0], dtype=jnp.int32)
    ends = jax.lax.dynamic_index_in_dim(cut, last, 2)
    error = _errors(cut, ends, i, last)
    total = before + jnp.where(i == last, 0.0, error)
    return jnp.min(jnp.where(total == jnp.min(total), i, i.size)).astype(jnp.int32)


def exact_centroids(table: Intervals, length: int, k: int) -> jax.Array:
    """Centroids [k] float32, ascending, of an optimal clustering of the first `length` values of the table's row.

    Values past `length` must have no weight. Where fewer than k clusters are needed, the first centroid is repeated.
    """
    size = block_size(length)
    blocks = -(-length // size)
    flat = table.cut[:, :, : blocks * size]
    cut = flat.reshape(-1, 3, blocks, size)
    own_errors, end_errors = _block_errors(cut)
    column = jnp.arange(blocks, dtype=jnp.int32)[:, None]

    def shift(best: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.zeros((1,), best.dtype), best[:-1]])

    def layer(best: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        before = shift(best).reshape(blocks, size)
        turned = before.T[:, :, None]
        least = _least(size, lambda i: turned[i] + end_errors[i])
        ends = jnp.min(jnp.where(least == jnp.min(least, 0), column, blocks - 1), 0)
        # Rounding can put equal minima out of order; the running maximum restores the bound.
        ends = jnp.max(jnp.where(column <= column.T, ends[:, None], 0), 0)
        own = _least(size, lambda i: before[:, i, None] + own_errors[:, i])
        return _tile_minimum(cut, before, ends, own).reshape(-1), best

    def cluster(last: jax.Array, best: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        first = jnp.where(last < 0, 0, _minimiser(flat, shift(best), jnp.maximum(last, 0)))
        return first - 1, (first, last)

    best, earlier = jax.lax.scan(layer, table.head[2, : blocks * size], None, length=max(k - 2, 0))
    layers = jnp.concatenate([earlier, best[None]])[: k - 1]
    end, (first, last) = jax.lax.scan(cluster, jnp.int32(blocks * size - 1), layers, reverse=True)
    first, last = jnp.append(0, first), jnp.append(end, last)
    _, mean = weight_and_mean(table, first, last)
    lowest = jnp.min(jnp.where(last < first, jnp.inf, mean))
    return jnp.sort(jnp.where(last < first, lowest, mean))
