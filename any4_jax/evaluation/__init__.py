"""Evaluation: perplexity, the divergence from another model, their errors, and needles found in long texts."""

from any4_jax.evaluation.divergence import Divergence, divergence
from any4_jax.evaluation.needle import Trial, needle
from any4_jax.evaluation.perplexity import Difference, Perplexity, paired_difference, perplexity

__all__ = ["Difference", "Divergence", "Perplexity", "Trial", "divergence", "needle", "paired_difference", "perplexity"]
