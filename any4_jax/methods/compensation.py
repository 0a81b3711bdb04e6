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

from any4_jax import formats, scaling

HIGHEST = jax.lax.Precision.HIGHEST


class Factor(NamedTuple):
    """A Hessian for a sequence of columns.

    Attributes:
      upper: U, float32 [K, K], upper triangular with ones on the diagonal.
      pivots: the diagonal of R, float32 [K].
      positive: whether the Hessian is positive definite, bool [].
    """

    upper: jax.Array
    pivots: jax.Array
    positive: jax.Array


def damped(hessian: jax.Array, damping: float | jax.Array) -> jax.Array:
    """A Hessian float32 [K, K] with `damping` times the mean of its diagonal added to the diagonal.

    Inputs that were always zero don't count in the mean, and get the mean itself.
    """
    diagonal = jnp.diagonal(hessian)
    alive = diagonal > 0
    mean = diagonal.sum() / jnp.maximum(alive.sum(), 1).astype(jnp.float32)
    mean = jnp.where(mean > 0, mean, 1.0)
    on_diagonal = jnp.eye(hessian.shape[0], dtype=bool)
    return jnp.where(on_diagonal, jnp.where(alive, diagonal + damping * mean, mean), hessian)


def factor(hessian: jax.Array, order: jax.Array, damping: float | jax.Array) -> Factor:
    """Factors a Hessian float32 [K, K], once `damped`, for the columns taken in the order int32 [K].

    The rows and columns of U of inputs that were always zero are those of the identity, so no error passes to or from
    their weights.
    """
    ordered = damped(hessian, damping)[order][:, order]
    # The Cholesky factor of the matrix with both axes reversed is R reversed.
    reverse = jnp.linalg.cholesky(ordered[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]
    pivots = jnp.diagonal(reverse)
    # A pivot below the rounding error of its sum is noise: exact arithmetic would give zero, or less.
    positive = (jnp.square(pivots) > jnp.finfo(jnp.float32).eps * jnp.diagonal(ordered)).all()
    return Factor(jnp.triu(reverse / pivots), pivots, positive)


def solve(factored: Factor, rows: jax.Array) -> jax.Array:
    """X with X H = rows, both float32 [N, K] with columns in the sequence of the factor of H."""
    upper = factored.upper
    inner = jax.scipy.linalg.solve_triangular(upper, rows.T, lower=False, unit_diagonal=True)
    inner = inner / jnp.square(factored.pivots)[:, None]
    return jax.scipy.linalg.solve_triangular(upper, inner, trans=1, lower=False, unit_diagonal=True).T


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

        def column(i, within):
            codes, errors = within
            value = wanted[i] + jnp.matmul(corner[:, i], errors, precision=HIGHEST)
            group = groups[start + i]
            scale = scales[:, group][:, None]
            offset = None if offsets is None else offsets[:, group][:, None]
            u = scaling.normalize(value[:, None], scale, offset, 1)
            code = formats.nearest(u, table, uniform=uniform)
            level = jnp.take_along_axis(table, code.astype(jnp.int32), axis=1)
            found = level * scaling.scale_values(scale)
            if offset is not None:
                found = found + offset.astype(jnp.float32)
            return codes.at[i].set(code[:, 0]), errors.at[i].set(own[i] - found[:, 0])

        start_of_block = jnp.zeros((block, n), jnp.uint8), jnp.zeros((block, n), jnp.float32)
        new_codes, new_errors = jax.lax.fori_loop(0, block, column, start_of_block)
        codes = jax.lax.dynamic_update_slice_in_dim(codes, new_codes, start, axis=0)
        errors = jax.lax.dynamic_update_slice_in_dim(errors, new_errors, start, axis=0)
        return codes, errors, scales, offsets

    state = jnp.zeros(targets.shape, jnp.uint8), jnp.zeros(targets.shape, jnp.float32), grid.scales, grid.offsets
    codes, _, scales, offsets = jax.lax.fori_loop(0, (k + more) // block, work_on_block, state)
    return codes[:k].T, Grid(grid.lut, scales, offsets)
