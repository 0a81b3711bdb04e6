"""A search for the scale and offset of each group, given the row's table.

A group's error as a function of its scale has many local minima, since weights change their codes; least squares from
one start finds the nearest. Here several starts are tried: the range that the table covers is shrunk or stretched by a
few factors, with its lower end, its middle or its upper end held.
"""

import jax
import jax.numpy as jnp

from any4_jax import scaling
from any4_jax.methods.grouped import (
    Cells,
    Groups,
    Moments,
    error_from,
    group_errors,
    least_squares,
    levels_of,
    moments_of_levels,
    moments_of_weights,
)

FACTORS = (0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15)
"""Steps of 5 %: steps of 10 % leave 3 % more error, and factors beyond these are seldom the best (SmolLM2-135M)."""

HELD = (0.0, 0.5, 1.0)
"""The point of the table's range that stays where it is: 0 the lower end, 1 the upper."""


def search_scales(cells: Cells, table: jax.Array, groups: Groups) -> Groups:
    """For each group the best of its own and of the least-squares fits from other scales, codes chosen anew.

    Args:
      cells: weights and importance.
      table: float32 [2**bits, R], ascending.
      groups: where to start. Without offsets the ranges shrink and stretch about zero.

    Returns:
      Groups of lower or equal error, group by group.
    """
    held = HELD if groups.offsets is not None else HELD[:1]
    factors, points = (jnp.asarray(a, jnp.float32) for a in (FACTORS, held))
    known = moments_of_weights(cells)
    s, o = groups.scale_values(), groups.offset_values()

    def fitted(at: Groups) -> tuple[jax.Array, Groups]:
        # The codes that suit the first fit show what the start is worth: choosing by one fit leaves 1 % more error.
        for _ in range(2):
            moments = Moments(*known, *moments_of_levels(cells, levels_of(cells, table, at), known[0]))
            at = least_squares(moments, at)
        return error_from(moments, at), at

    def attempt(i, state):
        scales = scaling.rounded(s * factors[i // len(held)], groups.scales.dtype)
        offsets = None
        if groups.offsets is not None:
            still = table[0] + (table[-1] - table[0]) * points[i % len(held)]
            offsets = scaling.rounded(o + (s - scales.astype(jnp.float32)) * still, groups.offsets.dtype)
        error, new = fitted(Groups(scales, offsets))
        lowest, best = state
        better = error < lowest
        return jnp.minimum(error, lowest), jax.tree.map(lambda a, b: jnp.where(better, a, b), new, best)

    _, best = jax.lax.fori_loop(0, len(FACTORS) * len(held), attempt, fitted(groups))
    before, after = (group_errors(cells, levels_of(cells, table, g), g) for g in (groups, best))
    better = after < before
    return jax.tree.map(lambda a, b: jnp.where(better, a, b), best, groups)
