"""Judging a model: perplexity, its error, and differences between models on the same text."""

from any4_jax.evaluation.perplexity import Difference, Perplexity, paired_difference, perplexity

__all__ = ["Difference", "Perplexity", "paired_difference", "perplexity"]
