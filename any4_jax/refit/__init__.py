"""Least-squares polish of table-coded rows on their stored dtypes."""

from any4_jax.refit.fit import refit
from any4_jax.refit.xla import Fit

__all__ = ["Fit", "refit"]
