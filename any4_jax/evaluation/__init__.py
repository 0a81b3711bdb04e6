"""Evaluation: perplexity, divergence from another model, errors of both; layers; needles in long texts."""

from any4_jax.evaluation.analysis import Analysis, analyze
from any4_jax.evaluation.divergence import Divergence, divergence
from any4_jax.evaluation.layer_errors import Deviation, LayerError, LayerErrors, layer_errors
from any4_jax.evaluation.needle import Trial, needle
from any4_jax.evaluation.perplexity import Difference, Perplexity, paired_difference, perplexity

__all__ = [
    "Analysis",
    "Deviation",
    "Difference",
    "Divergence",
    "LayerError",
    "LayerErrors",
    "Perplexity",
    "Trial",
    "analyze",
    "divergence",
    "layer_errors",
    "needle",
    "paired_difference",
    "perplexity",
]
