"""Rows of weights laid out by group, for fits of scales and offsets.

Arrays are [G, groups, rows]: rows lie next to each other in memory, so that one instruction works on many of them, and
what belongs to a group or a row is broadcast instead of being gathered.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from any4_jax import scaling


class Cells(NamedTuple):
    """Weights w float32 [G, groups, R] and their importance h [G, groups, 1], zero on the padding of a short group."""

    w: jax.Array
    h: jax.Array


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
    """Weighted sums over each group, [groups, R], of weights w and levels t about the mean weight m.

    mass = sum h, spread = sum h (w - m)^2, t = sum h t, tt = sum h t^2, tw = sum h t (w - m).
    """

    mean: jax.Array
    mass: jax.Array
    spread: jax.Array
    t: jax.Array
    tt: jax.Array
    tw: jax.Array


def group_sum(values: jax.Array) -> jax.Array:
    """The sum over the first axis, by halves.

    XLA's own sum over a leading axis that is fused with what makes its terms takes a CPU three times as long.
    """
    length = values.shape[0]
    padded = 1 << max(length - 1, 0).bit_length()
    values = jnp.pad(values, [(0, padded - length)] + [(0, 0)] * (values.ndim - 1))
    while values.shape[0] > 1:
        half = values.shape[0] // 2
        values = values[:half] + values[half:]
    return values[0]


def cells_of(w: jax.Array, importance: jax.Array, group_size: int) -> Cells:
    """w [R, K] and importance [K] by group; the last group is filled up with weights of no importance."""
    short = -w.shape[1] % group_size
    by_group = scaling.to_groups(w, group_size)
    h = jnp.pad(importance, (0, short)).reshape(-1, group_size)
    return Cells(by_group.transpose(2, 1, 0), h.T[:, :, None])


def levels_of(cells: Cells, table: jax.Array, groups: Groups) -> jax.Array:
    """The entry of the row's table [2**bits, R] nearest to each weight: [G, groups, R]."""
    s, o = groups.scale_values(), groups.offset_values()
    levels = jnp.broadcast_to(table[0], cells.w.shape)
    for i in range(table.shape[0] - 1):
        border = (table[i] + table[i + 1]) / 2 * s + o
        levels = jnp.where(cells.w > border, table[i + 1], levels)
    return levels


def group_errors(cells: Cells, levels: jax.Array, groups: Groups) -> jax.Array:
    """Weighted squared error of each group, [groups, R]."""
    gap = cells.w - (levels * groups.scale_values() + groups.offset_values())
    return group_sum(cells.h * gap * gap)


def moments_of_weights(cells: Cells) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean weight, mass and spread of each group, [groups, R] each; see `Moments`."""
    mass = jnp.broadcast_to(group_sum(cells.h), cells.w.shape[1:])
    mean = group_sum(cells.h * cells.w) / jnp.where(mass == 0, 1.0, mass)
    centred = cells.w - mean
    return mean, mass, group_sum(cells.h * centred * centred)


def moments_of_levels(cells: Cells, levels: jax.Array, mean: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """t, tt and tw of `Moments`."""
    weighted = cells.h * levels
    return group_sum(weighted), group_sum(weighted * levels), group_sum(weighted * (cells.w - mean))


def least_squares(moments: Moments, groups: Groups) -> Groups:
    """The scale and offset of least error for the levels, rounded; groups of one level keep their scale.

    Without offsets, that of the scale alone.
    """
    mean, mass, _, t, tt, tw = moments
    old = groups.scale_values()
    safe = jnp.where(mass == 0, 1.0, mass)
    if groups.offsets is None:
        # About zero, not about the mean: sum h t w.
        spread, product = tt, tw + mean * t
    else:
        spread, product = tt - t * (t / safe), tw
    scale = product / jnp.where(spread > 0, spread, 1.0)
    scales = scaling.rounded(jnp.where((spread > 0) & (scale > 0), scale, old), groups.scales.dtype)
    if groups.offsets is None:
        return Groups(scales, None)
    offsets = scaling.rounded(mean - scales.astype(jnp.float32) * (t / safe), groups.offsets.dtype)
    return Groups(scales, offsets)


def error_from(moments: Moments, groups: Groups) -> jax.Array:
    """`group_errors` by the moments: quicker, and off by some 1e-5 of itself. [groups, R]."""
    mean, mass, spread, t, tt, tw = moments
    s, o = groups.scale_values(), groups.offset_values() - mean
    return spread + s * (s * tt - 2 * tw) + o * (2 * s * t + o * mass)


def fit_groups(cells: Cells, levels: jax.Array, groups: Groups) -> Groups:
    """Least-squares scales and offsets where, rounded, they lower a group's error."""
    mean, mass, spread = moments_of_weights(cells)
    new = least_squares(Moments(mean, mass, spread, *moments_of_levels(cells, levels, mean)), groups)
    better = group_errors(cells, levels, new) < group_errors(cells, levels, groups)
    return jax.tree.map(lambda ours, theirs: jnp.where(better, ours, theirs), new, groups)
