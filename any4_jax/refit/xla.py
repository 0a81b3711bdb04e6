"""The refit in jax.numpy: it runs on every platform, and is the reference that the other backends must match.

The error of a row is sum_k h_k (w_k - lut[c_k] s_g(k) - o_g(k))^2. It is lowered in turn by the codes (nearest), the
table (each entry alone), and the scale and offset (each group alone, in closed form; the first rounds also try other
scales for each group and keep the best). An update is rounded to its stored dtype first and taken only where it lowers
the error, so no round raises a row's error.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from any4_jax import scaling
from any4_jax.refit.groups import Cells, Groups, cells_of, errors, least_squares, levels_of, moments_of
from any4_jax.refit.scale_search import search_scales

SETTLED = 3e-3
"""A row has settled, and is left alone, once a round lowers its error by less than this share. On SmolLM2-135M more
rounds would lower the error by 0.2 % in all, and this backend would take up to half as long again."""


class Fit(NamedTuple):
    """What is refitted: tables [R, 2**bits], scales [R, ceil(K/G)] and offsets like them or None, in stored dtypes."""

    lut: jax.Array
    scales: jax.Array
    offsets: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of `refit` that are known while tracing.

    first, stop: the table's entries that may change.
    """

    group_size: int
    searches: int
    max_rounds: int
    first: int
    stop: int


def solve(w: jax.Array, importance: jax.Array, start: Fit, options: Options) -> Fit:
    """The fit of rows w [R, K] under importance [K]; see `refit`."""
    cells = cells_of(w, importance, options.group_size)
    table = jnp.broadcast_to(start.lut.astype(jnp.float32), (w.shape[0], start.lut.shape[1])).T
    dtype = start.lut.dtype
    free = range(options.first, options.stop)
    groups = Groups(start.scales.T, None if start.offsets is None else start.offsets.T)

    def error(table, groups):
        return errors(cells, levels_of(cells, table, groups), groups).sum(axis=0)

    def step(state):
        count, active, before, table, groups = state
        new = groups
        if options.searches > 0:
            new = jax.lax.cond(count < options.searches, lambda: search_scales(cells, table, groups), lambda: groups)
        changed = _fit_table(cells, table, new, free, dtype) if free else table
        new = least_squares(cells, moments_of(cells, levels_of(cells, changed, new)), new)
        after = error(changed, new)
        better = active & (after < before)
        table = jnp.where(better, changed, table)
        groups = jax.tree.map(lambda ours, theirs: jnp.where(better, ours, theirs), new, groups)
        still = better & ((before - after > SETTLED * before) | (count + 1 < options.searches))
        return count + 1, still, jnp.where(better, after, before), table, groups

    state = (jnp.int32(0), jnp.ones(w.shape[0], bool), error(table, groups), table, groups)
    state = jax.lax.while_loop(lambda s: (s[0] < options.max_rounds) & s[1].any(), step, state)
    table, groups = state[3:]
    lut = table.T.astype(dtype) if free else start.lut
    return Fit(lut, groups.scales.T, None if groups.offsets is None else groups.offsets.T)


def _fit_table(cells: Cells, table: jax.Array, groups: Groups, free: range, dtype) -> jax.Array:
    """Each free entry's weighted least-squares value over the weights that use it; the table stays ascending."""
    levels = levels_of(cells, table, groups)
    s = groups.scale_values()
    target = cells.w - groups.offset_values()
    mass, pull = cells.h * s * s, cells.h * s * target

    # A loop in the program, whose body is compiled once.
    def fit(i, fitted):
        old = jax.lax.dynamic_index_in_dim(table, i, 0, keepdims=False)
        # Equal entries are one level: each is fitted to all weights of that level, so they move together.
        mine = levels == old
        total = jnp.where(mine, mass, 0.0).sum(axis=(0, 1))
        pulled = jnp.where(mine, pull, 0.0).sum(axis=(0, 1))
        value = scaling.rounded(pulled / jnp.where(total == 0, 1.0, total), dtype).astype(jnp.float32)
        lower = total * (value + old) * (value - old) - 2 * pulled * (value - old) < 0
        return jax.lax.dynamic_update_index_in_dim(fitted, jnp.where(lower, value, old), i, 0)

    return jnp.sort(jax.lax.fori_loop(free.start, free.stop, fit, table), axis=0)
