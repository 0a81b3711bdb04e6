"""Weight, mean and squared error of any interval of a sorted row, in float32 without cancellation.

Differences of prefix sums lose every digit where a cluster is tight or the row has a large common offset.
Here an interval is cut at a point p that depends on its ends only, and the moments of its two parts are kept
as distances from x[p], which are sums of terms of one sign; joining the parts adds non-negative terms (Chan,
Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979). The
relative error of a squared error is therefore a few units in the last place, whatever the row's offset and
scale.

The cut of [i, j] is the start of j's half in the smallest aligned power-of-two segment that holds both ends,
so each position is stored once per segment size: log2(P) * P entries answer all P * P intervals.

Moments of intervals that end at a reference point are arrays [3, ...], float32, none negative: the weight sum w, the
distance |weighted mean - reference| and the error sum w * (x - weighted mean)^2. One array rather than three, since the
time to compile grows with the number of operations.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Stands in for an empty weight in denominators. Weights are scaled to a maximum in [1, 2) first, so that it
# is far below anything that could change a result, and its products with squared distances do not become
# denormal.
EMPTY = 1e-30


class Intervals(NamedTuple):
    """What `build` derives from a sorted row of P values.

    x, w: [P], the row and its weights.
    cut: [log2(P), 3, P]; entry (l, :, j) has the moments from j to the middle of j's aligned segment of 2**(l + 1)
        values, measured from there.
    head: [3, P], moments of [0, j], measured from x[0].
    """

    x: jax.Array
    w: jax.Array
    cut: jax.Array
    head: jax.Array


def join_error(left: jax.Array, right: jax.Array) -> jax.Array:
    """Squared error of two adjacent intervals joined: [3, ...] each, measured from their common end, to [...]."""
    weight = left[0] + jnp.maximum(right[0], EMPTY)
    distance = left[1] + right[1]
    return left[2] + right[2] + left[0] * right[0] * (distance * distance) / weight


def _extend(near: jax.Array, far: jax.Array, near_from_middle: jax.Array, gap: jax.Array) -> jax.Array:
    """Moments of near + far, measured from near's own reference, which lies `gap` away from far's reference.

    near_from_middle: near's distance from far's reference.
    """
    weight = near[0] + far[0]
    total = jnp.maximum(weight, EMPTY)
    # Division comes last in each term, see weight_and_mean.
    distance = near[0] * near[1] / total + far[0] * (gap + far[1]) / total
    return jnp.stack([weight, distance, join_error(far, jnp.stack([near[0], near_from_middle, near[2]]))])


def build(x: jax.Array, w: jax.Array) -> Intervals:
    """Tables of a row x [P] sorted ascending and its weights w [P], float32, P a power of two >= 2."""
    size = x.shape[0]
    index = jnp.arange(size, dtype=jnp.int32)
    extended = jnp.append(x, x[-1])
    zero = jnp.zeros_like(x)
    # head: from a segment's start to j, measured from its first value.
    # tail: from j to the segment's end, measured from the first value after it (the row's last value at its end).
    head = jnp.stack([w, zero, zero])
    tail = jnp.stack([w, extended[1:] - x, zero])

    # A loop in the program rather than in Python: unrolled, XLA fuses the levels and recomputes each in the next.
    def double(halves: tuple[jax.Array, jax.Array], level: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        head, tail = halves
        second = (index >> level) & 1 == 1
        start = (index >> level >> 1) << level << 1
        middle = start + (1 << level)
        end = middle + (1 << level)
        cut = jnp.where(second, head, tail)
        # The other half as a whole: for a j in the second half, its head; in the first, its tail.
        both = jnp.concatenate([head, tail], 1)
        near = both[:, jnp.where(second, middle - 1, size + middle)]
        from_middle = both[1, jnp.where(second, size + start, end - 1)]
        gap = extended[jnp.where(second, middle, end)] - extended[jnp.where(second, start, middle)]
        grown = _extend(near, cut, from_middle, gap)
        return (jnp.where(second, grown, head), jnp.where(second, tail, grown)), cut

    levels = jnp.arange(size.bit_length() - 1, dtype=jnp.int32)
    (head, _), cut = jax.lax.scan(double, (head, tail), levels)
    return Intervals(x, w, cut, head)


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
    left_weight, left_distance, _ = jnp.moveaxis(table.cut[level, :, first], -1, 0)
    right_weight, right_distance, _ = jnp.moveaxis(table.cut[level, :, last], -1, 0)
    weight = left_weight + right_weight
    # Division comes last in each term: a product next to a sum may or may not become a fused multiply-add,
    # depending on the number of rows, and change the last bit.
    total = jnp.maximum(weight, EMPTY)
    moved = right_weight * right_distance / total - left_weight * left_distance / total
    mean = table.x[(last >> level) << level] + moved
    single = first == last
    weight = jnp.where(single, table.w[first], weight)
    return jnp.where(empty, 0.0, weight), jnp.where(single, table.x[first], mean)
