"""Normal equations of tables, scales and offsets under a Hessian, and their solution in stored dtypes.

A row's values q are linear in its table, and also in its scales and offsets together: q = B x. The error
(w - q) H (w - q)^T is least for a step d of x with B^T H B d = B^T H (w - q).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


class Equations(NamedTuple):
    """The equations of R rows for n unknowns each: matrix float32 [R, n, n], right-hand side float32 [R, n]."""

    matrix: jax.Array
    pull: jax.Array


def of_tables(codes: jax.Array, steps: jax.Array, entries: range, hessian: jax.Array, pull: jax.Array) -> Equations:
    """Equations of the `entries` of each row's table.

    Args:
      codes: uint8 [R, K].
      steps: float32 [R, K], what an entry is multiplied by in each column.
      entries: the n entries that are unknown.
      hessian: float32 [K, K].
      pull: (w - q) H, float32 [R, K].
    """

    def sums(values):
        """The sums of values [R, K] over the columns that have each entry, [R, n]."""
        mine = codes[:, None, :] == jnp.arange(entries.start, entries.stop, dtype=jnp.uint8)[:, None]
        return jnp.where(mine, values[:, None, :], 0.0).sum(axis=2)

    def row(entry):
        column = jnp.where(codes == entry, steps, 0.0)
        return sums(steps * jnp.matmul(column, hessian, precision=HIGHEST))

    # One entry at a time: no array is larger than [R, K].
    matrix = jax.lax.map(row, jnp.arange(entries.start, entries.stop, dtype=jnp.uint8))
    return Equations(matrix.transpose(1, 0, 2), sums(steps * pull))


def of_groups(
    levels: jax.Array, group_size: int, hessian: jax.Array, pull: jax.Array, *, scales: bool, offsets: bool
) -> Equations:
    """Equations of the offsets, if they are unknown, and then of the scales, if they are: n = 0, 1 or 2 a group.

    Args:
      levels: float32 [R, K], the table's entry of each weight.
      group_size: G; the last group may be short.
      hessian: float32 [K, K].
      pull: (w - q) H, float32 [R, K].
    """
    k = levels.shape[1]
    more = -k % group_size
    hessian = jnp.pad(hessian, ((0, more), (0, 0)))
    columns = jnp.pad(levels, ((0, 0), (0, more)))

    def sums(values):
        """The sums of values [..., K] over each group."""
        padded = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, more)])
        return padded.reshape(*values.shape[:-1], -1, group_size).sum(axis=-1)

    def onto(products):
        """The products [R, K] of one unknown's column with H, with the columns of all unknowns: [R, n]."""
        parts = ([sums(products)] if offsets else []) + ([sums(products * levels)] if scales else [])
        return jnp.concatenate(parts, axis=1)

    def of_offset(group):
        rows = jax.lax.dynamic_slice_in_dim(hessian, group * group_size, group_size)
        return onto(jnp.broadcast_to(rows.sum(axis=0), levels.shape))

    def of_scale(group):
        rows = jax.lax.dynamic_slice_in_dim(hessian, group * group_size, group_size)
        mine = jax.lax.dynamic_slice_in_dim(columns, group * group_size, group_size, axis=1)
        return onto(jnp.matmul(mine, rows, precision=HIGHEST))

    each = jnp.arange((k + more) // group_size)
    parts = [jax.lax.map(f, each) for f, unknown in ((of_offset, offsets), (of_scale, scales)) if unknown]
    return Equations(jnp.concatenate(parts).transpose(1, 0, 2), onto(pull))


def solve_rounded(
    equations: Equations, old: jax.Array, size: jax.Array, stored: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """New values of the unknowns, as they are stored.

    Unknowns are found from the last to the first. Each is rounded as soon as it is found, so those that follow take
    over its rounding error: on so small a matrix, GPTQ's way of rounding (Babai's nearest plane). An unknown on which
    nothing depends keeps its value.

    Args:
      equations: for steps in some unit.
      old: the values to step from, float32 [R, n].
      size: the unit of each step, float32 [R, n].
      stored: (values float32 [R], index of the unknown) -> the values that are stored, float32 [R].

    Returns:
      float32 [R, n]; NaN where a row's matrix is not positive definite.
    """
    n = old.shape[1]
    diagonal = jnp.diagonal(equations.matrix, axis1=1, axis2=2)
    used = diagonal > 0
    # A diagonal of ones; the ridge is what rounding may take from it.
    shrink = jnp.where(used, jax.lax.rsqrt(jnp.where(used, diagonal, 1.0)), 1.0)
    ridge = jnp.where(used, 1.0 + n * jnp.finfo(jnp.float32).eps, 1.0)
    scaled = equations.matrix * shrink[:, :, None] * shrink[:, None, :]
    lower = jnp.linalg.cholesky(jnp.where(jnp.eye(n, dtype=bool), ridge[:, :, None], scaled), symmetrize_input=False)
    pulled = equations.pull * shrink
    free = jax.scipy.linalg.solve_triangular(lower, pulled[:, :, None], lower=True)[:, :, 0]
    whole = shrink * size

    def find(i, state):
        i = n - 1 - i
        steps, new = state
        step = (free[:, i] - (lower[:, :, i] * steps).sum(axis=1)) / lower[:, i, i]
        value = stored(old[:, i] + step * whole[:, i], i)
        return steps.at[:, i].set((value - old[:, i]) / whole[:, i]), new.at[:, i].set(value)

    return jax.lax.fori_loop(0, n, find, (jnp.zeros_like(old), old))[1]
