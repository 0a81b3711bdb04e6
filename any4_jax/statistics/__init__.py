"""What methods learn from the activations that enter a linear: a protocol, and the statistics that follow it."""

from any4_jax.statistics.gathered import DEFAULT, Gathered, Statistic, empty, from_activations, merge, update
from any4_jax.statistics.hessian import Hessian, HessianSum
from any4_jax.statistics.moments import AbsMax, Moments, MomentSums
from any4_jax.statistics.sample import Sample, SampledTokens

__all__ = [
    "DEFAULT",
    "AbsMax",
    "Gathered",
    "Hessian",
    "HessianSum",
    "MomentSums",
    "Moments",
    "Sample",
    "SampledTokens",
    "Statistic",
    "empty",
    "from_activations",
    "merge",
    "update",
]
