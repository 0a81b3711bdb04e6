"""The codes of one block of columns, in jax.numpy: the reference for every other body."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from any4_jax import formats

HIGHEST = jax.lax.Precision.HIGHEST


class Levels(NamedTuple):
    """The values that the weights of a block of B columns may take: table * scale + offset.

    Attributes:
      table: float32 [N, 2**bits], ascending.
      scales: float32 [B, N]; a weight whose scale is zero has the code that is nearest to zero.
      offsets: float32 [B, N], or None.
    """

    table: jax.Array
    scales: jax.Array
    offsets: jax.Array | None


def solve(
    own: jax.Array, wanted: jax.Array, corner: jax.Array, levels: Levels, *, uniform: bool
) -> tuple[jax.Array, jax.Array]:
    """The codes of a block of columns in sequence.

    Column i takes the codes nearest to wanted_i + sum_{j<i} corner_ji e_j, where e_j = own_j - level_j is the error of
    column j.

    Args:
      own: the weights, float32 [B, N].
      wanted: the weights with what the errors of all columns before the block add to them, float32 [B, N].
      corner: the block's part of U, float32 [B, B], upper triangular with ones on the diagonal; see `Factor`.
      levels: see `Levels`.
      uniform: whether the table is an arithmetic ramp, see `formats.nearest`.

    Returns:
      (codes uint8 [B, N], errors float32 [B, N]).
    """

    def column(i, state):
        codes, errors = state
        code, found = nearest_in_column(i, value_of_column(i, wanted, corner, errors), levels, uniform)
        return codes.at[i].set(code), errors.at[i].set(own[i] - found)

    nothing = jnp.zeros(own.shape, jnp.uint8), jnp.zeros(own.shape, jnp.float32)
    return jax.lax.fori_loop(0, own.shape[0], column, nothing)


def value_of_column(i: jax.Array, wanted: jax.Array, corner: jax.Array, errors: jax.Array) -> jax.Array:
    """What the weights of column i are to be, [N], once the errors before it are compensated."""
    # The errors from column i on are still zero, so its own entry of the corner counts for nothing.
    return wanted[i] + jnp.matmul(corner[:, i], errors, precision=HIGHEST)


def nearest_in_column(i: jax.Array, value: jax.Array, levels: Levels, uniform: bool) -> tuple[jax.Array, jax.Array]:
    """The codes [N] of column i that are nearest to these values [N], and the levels [N] that they stand for."""
    scale, offset = levels.scales[i], 0.0 if levels.offsets is None else levels.offsets[i]
    u = jnp.where(scale == 0, 0.0, (value - offset) / jnp.where(scale == 0, 1.0, scale))
    code = formats.nearest(u[:, None], levels.table, uniform=uniform)
    found = jnp.take_along_axis(levels.table, code.astype(jnp.int32), axis=1)[:, 0] * scale + offset
    return code[:, 0], found
