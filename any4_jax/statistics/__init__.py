"""What methods learn from the activations that enter a linear: a protocol, and the statistics that follow it."""

from any4_jax.statistics.drift import Drift, DriftSum
from any4_jax.statistics.files import CATALOGUE, load, save
from any4_jax.statistics.gathered import (
    DEFAULT,
    Gathered,
    Statistic,
    empty,
    from_activations,
    is_paired,
    merge,
    update,
)
from any4_jax.statistics.hessian import Hessian, HessianSum
from any4_jax.statistics.largest import Largest, LargestTokens
from any4_jax.statistics.moments import AbsMax, Moments, MomentSums
from any4_jax.statistics.sample import Sample, SampledTokens

__all__ = [
    "CATALOGUE",
    "DEFAULT",
    "AbsMax",
    "Drift",
    "DriftSum",
    "Gathered",
    "Hessian",
    "HessianSum",
    "Largest",
    "LargestTokens",
    "MomentSums",
    "Moments",
    "Sample",
    "SampledTokens",
    "Statistic",
    "empty",
    "from_activations",
    "is_paired",
    "load",
    "merge",
    "save",
    "update",
]
