"""Least-squares refinement of table-coded rows, in the dtypes in which they are stored."""

from any4_jax.refit.fit import refit
from any4_jax.refit.xla import Fit

__all__ = ["Fit", "refit"]
