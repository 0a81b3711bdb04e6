"""Codes that compensate each other, beside a few weights that are kept (SpQR, arXiv 2306.03078)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from any4_jax import scaling
from any4_jax.compensation.xla import Levels, nearest_in_column, value_of_column


class Outliers(NamedTuple):
    """Which weights are kept: those that are farther from the nearest level than a limit.

    Attributes:
      limits: float32 [K], for each of the columns in sequence.
      dtype: in which what is kept of a weight is stored.
    """

    limits: jax.Array
    dtype: Any


def solve_beside_outliers(
    own: jax.Array, wanted: jax.Array, corner: jax.Array, levels: Levels, outliers: Outliers, *, uniform: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `xla.solve`, where the nearest level may be too far from what a weight is to be.

    Then the difference is kept beside the code, as it is stored, and only what is lost in rounding it is an error that
    later columns compensate.

    Args:
      own, wanted, corner, levels, uniform: as in `xla.solve`.
      outliers: with the limits of these columns, [B].

    Returns:
      (codes uint8 [B, N], errors float32 [B, N], what is kept [B, N] in the dtype of `outliers`, zero elsewhere).
    """

    def column(i, state):
        codes, errors, kept = state
        value = value_of_column(i, wanted, corner, errors)
        code, found = nearest_in_column(i, value, levels, uniform)
        more = jnp.where(jnp.abs(value - found) > outliers.limits[i], value - found, 0.0)
        more = scaling.rounded(more, outliers.dtype)
        error = own[i] - (found + more.astype(jnp.float32))
        return codes.at[i].set(code), errors.at[i].set(error), kept.at[i].set(more)

    nothing = (jnp.zeros(own.shape, dtype) for dtype in (jnp.uint8, jnp.float32, outliers.dtype))
    return jax.lax.fori_loop(0, own.shape[0], column, tuple(nothing))
