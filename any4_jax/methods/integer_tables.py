"""Tables of integers: the factor between a row's values and its integers goes into the row's group scales."""

import jax
import jax.numpy as jnp

from any4_jax import scaling
from any4_jax.refit import Fit


def stored(fit: Fit, dtype) -> Fit:
    """A fit whose table is float32, with the table in the dtype in which it is stored and the scales that suit it."""
    if jnp.issubdtype(dtype, jnp.floating):
        return fit._replace(lut=scaling.rounded(fit.lut, dtype))
    reach = _reach(fit.lut)
    integers = fit.lut * (scaling.largest_integer(dtype) / jnp.where(reach == 0, 1.0, reach))
    return reaching(fit._replace(lut=scaling.rounded(integers, dtype)), reach)


def reaching(fit: Fit, reach: jax.Array) -> Fit:
    """The fit with its scales multiplied so that a row's largest integer stands for what `reach`, float32 [R or 1, 1],
    stood for."""
    most = _reach(fit.lut)
    # A table of zeros, or of a row of them, has no use for a factor.
    factor = jnp.where((most == 0) | (reach == 0), 1.0, reach / jnp.where(most == 0, 1.0, most))
    return fit._replace(scales=scaling.rounded(fit.scales.astype(jnp.float32) * factor, fit.scales.dtype))


def _reach(table: jax.Array) -> jax.Array:
    """The largest magnitude in each table, float32 [R or 1, 1]."""
    return jnp.abs(table.astype(jnp.float32)).max(axis=1, keepdims=True)
