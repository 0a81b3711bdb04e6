"""Weight, mean and squared error of any interval of a sorted row, in float32 without cancellation.

Differences of prefix sums lose every digit where a cluster is tight or the row has a large common offset.
Here an interval is cut at a point p that depends on its ends only, and the moments of its two parts are kept
as distances from x[p], which are sums of terms of one sign; joining the parts adds non-negative terms (Chan,
Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979). The
relative error of a squared error is therefore a few units in the last place, whatever the row's offset and
scale.

The cut of [i, j] is the start of j's half in the smallest aligned power-of-two segment that holds both ends,
so each position is stored once per segment size: log2(P) * P entries answer all P * P intervals.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Stands in for an empty weight in denominators. Weights are scaled to a maximum in [1, 2) first, so that it
# is far below anything that could change a result, and its products with squared distances do not become
# denormal.
EMPTY = 1e-30


class Moments(NamedTuple):
    """Moments of intervals that end at a reference point: arrays of one shape, float32, none negative.

    weight: sum of w.  distance: |weighted mean - reference|.  error: sum of w * (x - weighted mean)^2.
    """

    weight: jax.Array
    distance: jax.Array
    error: jax.Array


class Intervals(NamedTuple):
    """What `build` derives from a sorted row of P values.

    x, w: [P], the row and its weights.
    cut: Moments [log2(P), P]; entry (l, j) spans from j to the middle of j's aligned segment of 2**(l + 1)
    values.
    head: Moments [P] of [0, j], measured from x[0].
    tail_error: [log2(P), P]; entry (l, j) is the error from j to the end of j's aligned segment of 2**l
    values.
    """

    x: jax.Array
    w: jax.Array
    cut: Moments
    head: Moments
    tail_error: jax.Array


def join_error(left: Moments, right: Moments) -> jax.Array:
    """Squared error that joining two adjacent intervals adds to the sum of their own (shapes broadcast)."""
    distance = left.distance + right.distance
    weight = left.weight + jnp.maximum(right.weight, EMPTY)
    return left.weight * right.weight * (distance * distance) / weight


def _extend(near: Moments, far: Moments, near_from_middle: Moments, gap: jax.Array) -> Moments:
    """Moments of near + far, measured from near's own reference, which lies `gap` away from far's reference.

    near_from_middle: near's moments measured from far's reference.
    """
    weight = near.weight + far.weight
    total = jnp.maximum(weight, EMPTY)
    # Division comes last in each term, see weight_and_mean.
    distance = near.weight * near.distance / total + far.weight * (gap + far.distance) / total
    return Moments(weight, distance, near.error + far.error + join_error(far, near_from_middle))


def build(x: jax.Array, w: jax.Array) -> Intervals:
    """Tables of a row x [P] sorted ascending and its weights w [P], float32, P a power of two >= 2."""
    size = x.shape[0]
    index = jnp.arange(size, dtype=jnp.int32)
    extended = jnp.append(x, x[-1])
    zero = jnp.zeros_like(x)
    # head: from a segment's start to j, measured from its first value.
    # tail: from j to the segment's end, measured from the first value after it (the row's last value at its
    # end).
    head = Moments(w, zero, zero)
    tail = Moments(w, extended[1:] - x, zero)

    # A loop in the program rather than in Python: unrolled, XLA fuses the levels and recomputes each in the
    # next.
    def double(halves: tuple[Moments, Moments], level: jax.Array) -> tuple[tuple[Moments, Moments], tuple]:
        head, tail = halves
        second = (index >> level) & 1 == 1
        start = (index >> level >> 1) << level << 1
        middle = start + (1 << level)
        end = middle + (1 << level)
        cut = Moments(*(jnp.where(second, h, t) for h, t in zip(head, tail, strict=True)))
        # The other half as a whole: for a j in the second half, its head; in the first, its tail.
        whole = jnp.where(second, middle - 1, size + middle)
        both = Moments(*(jnp.concatenate(pair) for pair in zip(head, tail, strict=True)))
        near = Moments(*(m[whole] for m in both))
        from_middle = near._replace(distance=both.distance[jnp.where(second, size + start, end - 1)])
        gap = jnp.where(second, extended[middle] - extended[start], extended[end] - extended[middle])
        grown = _extend(near, cut, from_middle, gap)
        new_head = Moments(*(jnp.where(second, g, h) for g, h in zip(grown, head, strict=True)))
        new_tail = Moments(*(jnp.where(second, t, g) for g, t in zip(grown, tail, strict=True)))
        return (new_head, new_tail), (cut, tail.error)

    levels = jnp.arange(size.bit_length() - 1, dtype=jnp.int32)
    (head, _), (cut, tail_error) = jax.lax.scan(double, (head, tail), levels)
    return Intervals(x, w, cut, head, tail_error)


def cut_level(first: jax.Array, last: jax.Array) -> jax.Array:
    """Row of `Intervals.cut` at which [first, last] is cut: int32, for first < last (0 if equal)."""
    return jnp.maximum(31 - jax.lax.clz(first ^ last), 0)


def weight_and_mean(table: Intervals, first: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weight and weighted mean of the intervals [first, last]: int32 indices of any one shape, ends included.

    Both are float32. The weight is 0 where last < first; the mean then is some value of the row.
    """
    first = jnp.clip(first, 0, table.x.shape[0] - 1)
    empty = last < first
    last = jnp.maximum(last, first)
    level = cut_level(first, last)
    left = Moments(*(m[level, first] for m in table.cut))
    right = Moments(*(m[level, last] for m in table.cut))
    weight = left.weight + right.weight
    # Division comes last in each term: a product next to a sum may or may not become a fused multiply-add,
    # depending on the number of rows, and change the last bit.
    total = jnp.maximum(weight, EMPTY)
    moved = right.weight * right.distance / total - left.weight * left.distance / total
    mean = table.x[(last >> level) << level] + moved
    single = first == last
    weight = jnp.where(single, table.w[first], weight)
    return jnp.where(empty, 0.0, weight), jnp.where(single, table.x[first], mean)
