"""Error compensation under a Hessian: the solver of GPTQ."""

from any4_jax.compensation.compensate import Grid, Rescale, compensate
from any4_jax.compensation.factor import Factor, damped, factor, solve

__all__ = ["Factor", "Grid", "Rescale", "compensate", "damped", "factor", "solve"]
