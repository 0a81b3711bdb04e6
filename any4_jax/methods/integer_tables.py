"""Tables of integers: the factor between a row's values and its integers goes into the row's group scales."""

import jax
import jax.numpy as jnp

from any4_jax import scaling
from any4_jax.refit import Fit


def stored(table: jax.Array, groups: scaling.GroupScales, dtype) -> Fit:
    """A learned table in the dtype in which it is stored, with the scales and offsets that suit it.

    Args:
      table: float32 [R or 1, 2**bits], ascending, learned for the scales.
      groups: scales and offsets [R, ceil(K/G)] in stored dtypes; floating scales where the table becomes integers.
      dtype: of the table.
    """
    if jnp.issubdtype(dtype, jnp.floating):
        return Fit(scaling.rounded(table, dtype), *groups)
    reach = jnp.abs(table).max(axis=1, keepdims=True)
    integers = table * (scaling.largest_integer(dtype) / jnp.where(reach == 0, 1.0, reach))
    return reaching(Fit(scaling.rounded(integers, dtype), *groups), reach)


def reaching(fit: Fit, reach: jax.Array) -> Fit:
    """The fit with its scales multiplied so that a row's largest integer stands for `reach` [R or 1, 1] of its old
    scales."""
    most = jnp.abs(fit.lut.astype(jnp.float32)).max(axis=1, keepdims=True)
    factor = jnp.where((most == 0) | (reach == 0), 1.0, reach / jnp.where(most == 0, 1.0, most))
    return fit._replace(scales=scaling.rounded(fit.scales.astype(jnp.float32) * factor, fit.scales.dtype))
