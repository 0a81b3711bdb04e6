"""Evaluation: perplexity, the divergence from another model, their errors, and differences on the same text."""

from any4_jax.evaluation.divergence import Divergence, divergence
from any4_jax.evaluation.perplexity import Difference, Perplexity, paired_difference, perplexity

__all__ = ["Difference", "Divergence", "Perplexity", "divergence", "paired_difference", "perplexity"]
