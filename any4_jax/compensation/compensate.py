"""Codes chosen column by column under a Hessian: the solver of GPTQ (arXiv 2210.17323).

With H = R R^T, R upper triangular, the error of a row is

    (w - q) H (w - q)^T = sum_i (R_ii (w_i + sum_{j<i} (w_j - q_j) R_ji / R_ii - q_i))^2

so each column in turn takes the code nearest to w_i + sum_{j<i} (w_j - q_j) U_ji, where U is R with each column divided
by its diagonal. The sum is what GPTQ adds to a weight step by step by means of the inverse's Cholesky factor; here H is
factored once and never inverted. U is the identity where H is diagonal, and all weights are then rounded to nearest.

Matrices are [K, N] inside, so that a column of weights lies in one piece.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from any4_jax import scaling
from any4_jax.compensation.backends import choose
from any4_jax.compensation.xla import HIGHEST, Levels


class Grid(NamedTuple):
    """The values that weights may take.

    Attributes:
      lut: [N or 1, 2**bits], ascending.
      scales, offsets: [N, groups], as `scaling.normalize` takes them; offsets may be None.
    """

    lut: jax.Array
    scales: jax.Array
    offsets: jax.Array | None


class Rescale(NamedTuple):
    """Scaling groups as they come.

    Attributes:
      scale: (weights [N, G] of a group, their importance [G], tables) -> scale and offset [N, 1] in stored dtypes.
      importance: float32 [K] for the columns in sequence.
      group_size: G; groups are runs of so many columns of the sequence.
    """

    scale: Callable[[jax.Array, jax.Array, jax.Array], scaling.GroupScales]
    importance: jax.Array
    group_size: int


def compensate(
    w: jax.Array,
    upper: jax.Array,
    grid: Grid,
    groups: jax.Array,
    *,
    block: int,
    uniform: bool,
    rescale: Rescale | None = None,
) -> tuple[jax.Array, Grid]:
    """The codes of the columns of w in sequence, each compensating the errors of those before.

    Args:
      w: float32 [N, K], columns in sequence.
      upper: U for that sequence, see `Factor`.
      grid: tables, and the scales and offsets of each group.
      groups: int32 [K], the group of each column.
      block: columns that are worked on between two products with all columns before them. It changes nothing beyond
        rounding.
      uniform: whether the table is an arithmetic ramp, see `formats.nearest`.
      rescale: how each group is scaled again when its first column comes, from its weights as compensated so far; None
        keeps the scales of `grid`.

    Returns:
      (codes uint8 [N, K], the grid as it was used).
    """
    n, k = w.shape
    group_size = 1 if rescale is None else rescale.group_size
    if rescale is None:
        block = min(block, k)
    else:
        # A block lies in one group, and starts where the group starts.
        block = next(size for size in range(min(block, group_size), 0, -1) if group_size % size == 0)
    more = -k % max(block, group_size)
    targets = jnp.pad(w.T, ((0, more), (0, 0)))
    upper = jnp.pad(upper, ((0, more), (0, more)))
    groups = jnp.pad(groups, (0, more), mode="edge")
    table = jnp.broadcast_to(grid.lut.astype(jnp.float32), (n, grid.lut.shape[1]))

    def pulled(start, width, errors):
        """What the errors of all columns before `start` add to the `width` columns from there, [width, N]."""
        columns = jax.lax.dynamic_slice_in_dim(upper, start, width, axis=1)
        return jax.lax.dot_general(columns, errors, (((0,), (0,)), ((), ())), precision=HIGHEST)

    def rescaled(rescale, start, errors, scales, offsets):
        """The scales and offsets with those of the group at `start` replaced."""
        live = jax.lax.dynamic_slice_in_dim(targets, start, group_size)
        corner = jax.lax.dynamic_slice(upper, (start, start), (group_size, group_size))
        # The best values Y of the weights that are still free, given the errors so far: Y U_gg = pulled.
        moved = jax.scipy.linalg.solve_triangular(
            corner, pulled(start, group_size, errors), trans=1, lower=False, unit_diagonal=True
        )
        # A short group repeats its last weight, which changes no extremum and has no importance.
        columns = start + jnp.arange(group_size)
        within = jnp.minimum(columns, k - 1)
        importance = jnp.where(columns < k, rescale.importance[within], 0.0)
        made = rescale.scale((live + moved)[within - start].T, importance, grid.lut)
        group = start // group_size
        scales = jax.lax.dynamic_update_index_in_dim(scales, made.scales[:, 0], group, axis=1)
        if offsets is not None:
            offsets = jax.lax.dynamic_update_index_in_dim(offsets, made.offsets[:, 0], group, axis=1)
        return scales, offsets

    def work_on_block(index, state):
        start = index * block
        codes, errors, scales, offsets = state
        if rescale is not None:
            scales, offsets = jax.lax.cond(
                start % group_size == 0,
                lambda: rescaled(rescale, start, errors, scales, offsets),
                lambda: (scales, offsets),
            )
        own = jax.lax.dynamic_slice_in_dim(targets, start, block)
        wanted = own + pulled(start, block, errors)
        corner = jax.lax.dynamic_slice(upper, (start, start), (block, block))

        own_groups = jax.lax.dynamic_slice_in_dim(groups, start, block)
        grids = Levels(
            table,
            scaling.scale_values(scales[:, own_groups].T),
            None if offsets is None else offsets[:, own_groups].T.astype(jnp.float32),
        )
        new_codes, new_errors = choose(own, wanted, corner, grids, uniform=uniform)
        codes = jax.lax.dynamic_update_slice_in_dim(codes, new_codes, start, axis=0)
        errors = jax.lax.dynamic_update_slice_in_dim(errors, new_errors, start, axis=0)
        return codes, errors, scales, offsets

    state = jnp.zeros(targets.shape, jnp.uint8), jnp.zeros(targets.shape, jnp.float32), grid.scales, grid.offsets
    codes, _, scales, offsets = jax.lax.fori_loop(0, (k + more) // block, work_on_block, state)
    return codes[:k].T, Grid(grid.lut, scales, offsets)
