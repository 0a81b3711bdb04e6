"""Rows of weights laid out by group, for fits of scales and offsets.

Arrays are [G, groups, rows]: rows lie next to each other in memory, so that one instruction works on many of them, and
what belongs to a group or a row is broadcast instead of being gathered.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from any4_jax import scaling


class Cells(NamedTuple):
    """Weights by group, and the sums over each group that no fit changes.

    w: float32 [G, groups, R].
    h: their importance, [G, groups, 1]; zero on the padding of a short group.
    mass, mean, spread: sum h, the mean weight m under h, sum h (w - m)^2; [groups, R].
    """

    w: jax.Array
    h: jax.Array
    mass: jax.Array
    mean: jax.Array
    spread: jax.Array


class Groups(NamedTuple):
    """Scales and offsets (or None) [groups, R], in stored dtypes."""

    scales: jax.Array
    offsets: jax.Array | None

    def scale_values(self) -> jax.Array:
        return self.scales.astype(jnp.float32)

    def offset_values(self) -> jax.Array:
        zero = jnp.zeros(self.scales.shape, jnp.float32)
        return zero if self.offsets is None else self.offsets.astype(jnp.float32)


class Moments(NamedTuple):
    """Sums over each group of its levels t: t = sum h t, tt = sum h t^2, tw = sum h t (w - m); [groups, R]."""

    t: jax.Array
    tt: jax.Array
    tw: jax.Array


def group_sum(values: jax.Array) -> jax.Array:
    """The sum over the first axis, by halves.

    XLA's own sum over a leading axis takes three times as long on a CPU when it is fused with what computes its terms.
    """
    length = values.shape[0]
    padded = 1 << max(length - 1, 0).bit_length()
    values = jnp.pad(values, [(0, padded - length)] + [(0, 0)] * (values.ndim - 1))
    while values.shape[0] > 1:
        half = values.shape[0] // 2
        values = values[:half] + values[half:]
    return values[0]


def cells_of(w: jax.Array, importance: jax.Array, group_size: int) -> Cells:
    """w [R, K] and importance [K] by group; weights of no importance pad the last group."""
    short = -w.shape[1] % group_size
    w = scaling.to_groups(w, group_size).transpose(2, 1, 0)
    h = jnp.pad(importance, (0, short)).reshape(-1, group_size).T[:, :, None]
    mass = jnp.broadcast_to(h.sum(axis=0), w.shape[1:])
    mean = group_sum(h * w) / jnp.where(mass == 0, 1.0, mass)
    return Cells(w, h, mass, mean, group_sum(h * (w - mean) * (w - mean)))


def levels_of(cells: Cells, table: jax.Array, groups: Groups) -> jax.Array:
    """The entry of the row's table [2**bits, R] nearest to each weight: [G, groups, R]."""
    s, o = groups.scale_values(), groups.offset_values()
    levels = jnp.broadcast_to(table[0], cells.w.shape)
    for i in range(table.shape[0] - 1):
        border = (table[i] + table[i + 1]) / 2 * s + o
        levels = jnp.where(cells.w > border, table[i + 1], levels)
    return levels


def errors(cells: Cells, levels: jax.Array, groups: Groups) -> jax.Array:
    """Weighted squared error of each group, [groups, R]."""
    gap = cells.w - (levels * groups.scale_values() + groups.offset_values())
    return group_sum(cells.h * gap * gap)


def moments_of(cells: Cells, levels: jax.Array) -> Moments:
    """The moments of levels [G, groups, R]."""
    weighted = cells.h * levels
    return Moments(group_sum(weighted), group_sum(weighted * levels), group_sum(weighted * (cells.w - cells.mean)))


def errors_from(cells: Cells, moments: Moments, groups: Groups) -> jax.Array:
    """`errors` computed from the moments of the levels: faster, with a relative error of about 1e-5."""
    t, tt, tw = moments
    s, o = groups.scale_values(), groups.offset_values() - cells.mean
    return cells.spread + s * (s * tt - 2 * tw) + o * (2 * s * t + o * cells.mass)


def least_squares(cells: Cells, moments: Moments, groups: Groups) -> Groups:
    """The scales and offsets of least error for the levels, rounded. A group with one level keeps its scale, and a
    group without importance keeps its offset."""
    t, tt, tw = moments
    old = groups.scale_values()
    mean_level = t / jnp.where(cells.mass == 0, 1.0, cells.mass)
    if groups.offsets is None:
        # About zero, not about the mean: sum h t w.
        spread, product = tt, tw + cells.mean * t
    else:
        spread, product = tt - t * mean_level, tw
    scale = product / jnp.where(spread > 0, spread, 1.0)
    scales = scaling.rounded(jnp.where((spread > 0) & (scale > 0), scale, old), groups.scales.dtype)
    if groups.offsets is None:
        return Groups(scales, None)
    offsets = cells.mean - scales.astype(jnp.float32) * mean_level
    kept = jnp.where(cells.mass > 0, offsets, groups.offset_values())
    return Groups(scales, scaling.rounded(kept, groups.offsets.dtype))
