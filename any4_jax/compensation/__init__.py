"""Error compensation under a Hessian: the solver of GPTQ."""

from any4_jax.compensation.compensate import Compensated, Grid, Rescale, compensate
from any4_jax.compensation.factor import Factor, damped, factor, solve
from any4_jax.compensation.outliers import Outliers

__all__ = ["Compensated", "Factor", "Grid", "Outliers", "Rescale", "compensate", "damped", "factor", "solve"]
