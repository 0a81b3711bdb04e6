"""Codes chosen column by column under a Hessian: the solver of GPTQ (arXiv 2210.17323).

With H = R R^T, R upper triangular, the error of a row is

    (w - q) H (w - q)^T = sum_i (R_ii (w_i + sum_{j<i} (w_j - q_j) R_ji / R_ii - q_i))^2

so each column in turn takes the code nearest to w_i + sum_{j<i} (w_j - q_j) U_ji, where U is R with each column divided
by its diagonal. The sum is what GPTQ adds to a weight step by step by means of the inverse's Cholesky factor; here H is
factored once and never inverted. U is the identity where H is diagonal, and all weights are then rounded to nearest.

Matrices are [K, N] inside, so that a column of weights lies in one piece.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from any4_jax import scaling
from any4_jax.compensation.backends import choose
from any4_jax.compensation.outliers import Outliers, solve_beside_outliers
from any4_jax.compensation.xla import HIGHEST, Levels


class Grid(NamedTuple):
    """The values that weights may take.

    Attributes:
      lut: [N or 1, 2**bits], ascending.
      scales, offsets: [N, groups], as `scaling.normalize` takes them, or with a `Rescale` as it stores them; offsets
        may be None.
    """

    lut: jax.Array
    scales: Any
    offsets: Any


def as_stored(scales: jax.Array, offsets: jax.Array | None) -> scaling.GroupScales:
    """Scales and offsets in float32, of arrays in their stored dtypes."""
    return scaling.GroupScales(scaling.scale_values(scales), None if offsets is None else offsets.astype(jnp.float32))


class Rescale(NamedTuple):
    """Scaling groups as they come.

    Attributes:
      scale: (weights [N, G] of a group, their importance [..., G], tables) -> its scales and offsets as they are
        stored: a pair of arrays of the second axis 1, or of trees of such arrays; offsets may be None.
      importance: float32 [..., K] for the columns in sequence.
      group_size: G; groups are runs of so many columns of the sequence.
      decode: (scales, offsets) as stored, for any groups along the second axis -> float32 [N, groups] of each.
    """

    scale: Callable[[jax.Array, jax.Array, jax.Array], tuple[Any, Any]]
    importance: jax.Array
    group_size: int
    decode: Callable[[Any, Any], scaling.GroupScales] = as_stored


class Compensated(NamedTuple):
    """Codes uint8 [N, K], the grid as it was used, and what is kept of outliers beside their codes, [N, K] in its
    stored dtype with zeros elsewhere; None where there are no outliers to be."""

    codes: jax.Array
    grid: Grid
    kept: jax.Array | None


def compensate(
    w: jax.Array,
    upper: jax.Array,
    grid: Grid,
    groups: jax.Array,
    *,
    block: int,
    uniform: bool,
    rescale: Rescale | None = None,
    outliers: Outliers | None = None,
    backend: str | None = None,
) -> Compensated:
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
      outliers: which weights are kept beside their codes, for which there is "xla" alone; None for none.
      backend: what works on a block, "cuda", "cpu" or "xla"; None for the first that works on the platform.

    Raises:
      ValueError: there is no such backend, or it can't run here or not beside outliers.
    """
    if outliers is not None and backend not in (None, "xla"):
        raise ValueError(f"got backend={backend!r} with outliers, beside which only 'xla' works; pass None or 'xla'")
    n, k = w.shape
    decode = as_stored if rescale is None else rescale.decode
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
        importance = jnp.where(columns < k, rescale.importance[..., within], 0.0)
        made = rescale.scale((live + moved)[within - start].T, importance, grid.lut)
        group = start // group_size
        return jax.tree.map(
            lambda all_groups, one: jax.lax.dynamic_update_slice_in_dim(all_groups, one, group, axis=1),
            (scales, offsets),
            tuple(made),
        )

    def work_on_block(index, state):
        start = index * block
        (codes, errors, kept), scales, offsets = state
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
        near = decode(*jax.tree.map(lambda of_all: of_all[:, own_groups], (scales, offsets)))
        levels = Levels(table, near.scales.T, None if near.offsets is None else near.offsets.T)
        found: tuple[Any, ...]
        if outliers is None:
            found = (*choose(own, wanted, corner, levels, uniform=uniform, backend=backend), None)
        else:
            mine = outliers._replace(limits=jax.lax.dynamic_slice_in_dim(limits, start, block))
            found = solve_beside_outliers(own, wanted, corner, levels, mine, uniform=uniform)
        columns = jax.tree.map(
            lambda all_columns, new: jax.lax.dynamic_update_slice_in_dim(all_columns, new, start, axis=0),
            (codes, errors, kept),
            found,
        )
        return columns, scales, offsets

    limits: Any = None if outliers is None else jnp.pad(outliers.limits, (0, more), constant_values=jnp.inf)
    dtypes = (jnp.uint8, jnp.float32, None if outliers is None else outliers.dtype)
    nothing = tuple(None if dtype is None else jnp.zeros(targets.shape, dtype) for dtype in dtypes)
    state = nothing, grid.scales, grid.offsets
    (codes, _, kept), scales, offsets = jax.lax.fori_loop(0, (k + more) // block, work_on_block, state)
    return Compensated(codes[:k].T, Grid(grid.lut, scales, offsets), None if kept is None else kept[:k].T)
