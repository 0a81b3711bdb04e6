"""A search for the scale and offset of each group, given the row's table.

A group's error as a function of its scale has many local minima, since weights change their codes; least squares from
one start finds the nearest. Here several starts are tried: the range that the table covers is shrunk or stretched by a
few factors, with its lower end, its middle or its upper end held.
"""

import jax
import jax.numpy as jnp

from any4_jax import scaling
from any4_jax.refit.groups import Cells, Groups, errors_from, least_squares, levels_of, moments_of

FACTORS = (1.0, 0.95, 1.05, 0.9, 1.1, 0.84, 1.18, 0.77, 0.7)
"""Factors of the scale, finer where the best is likelier. 1 comes first, because the first of equally good starts is
kept. Three quarters as many starts leave 0.8 % more error, a quarter more of them 0.6 % less (SmolLM2-135M)."""

HELD = (0.0, 0.5, 1.0)
"""The point of the table's range that stays where it is: 0 the lower end, 1 the upper."""

FITS = 2
"""How many fits follow each start, each with the codes chosen again. After a single fit the codes are still those of
the start, and choosing by that error leaves 1 % more of it."""


def starts(has_offsets: bool) -> tuple[tuple[float, float], ...]:
    """The (factor, held) pairs that differ. Without offsets zero is held, and a factor of 1 moves nothing."""
    return tuple((f, p) for f in FACTORS for p in (HELD if has_offsets and f != 1.0 else HELD[:1]))


def search_scales(cells: Cells, table: jax.Array, groups: Groups) -> Groups:
    """For each group, the best of several least-squares fits, each started from another scale.

    Args:
      cells: weights and importance.
      table: float32 [2**bits, R], ascending.
      groups: the scales and offsets to start from; one of the fits starts from these as they are. Without offsets the
        ranges shrink and stretch about zero.

    Returns:
      Groups that are at least as good as the given ones, up to rounding: errors that differ by less than 1e-5 of
      themselves can't be told apart.
    """
    pairs = starts(groups.offsets is not None)
    factors, held = jnp.asarray(pairs, jnp.float32).T
    s, o = groups.scale_values(), groups.offset_values()

    def attempt(i, state):
        scales = scaling.rounded(s * factors[i], groups.scales.dtype)
        offsets = None
        if groups.offsets is not None:
            still = table[0] + (table[-1] - table[0]) * held[i]
            offsets = scaling.rounded(o + (s - scales.astype(jnp.float32)) * still, groups.offsets.dtype)

        def fit(_, state):
            moments = moments_of(cells, levels_of(cells, table, state[1]))
            new = least_squares(cells, moments, state[1])
            return errors_from(cells, moments, new), new

        lowest, best = state
        error, new = jax.lax.fori_loop(0, FITS, fit, (lowest, Groups(scales, offsets)))
        better = error < lowest
        return jnp.where(better, error, lowest), jax.tree.map(lambda a, b: jnp.where(better, a, b), new, best)

    nothing = jnp.full(s.shape, jnp.inf)
    return jax.lax.fori_loop(0, len(pairs), attempt, (nothing, groups))[1]
