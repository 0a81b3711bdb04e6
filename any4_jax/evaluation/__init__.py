"""Evaluation: perplexity, its error, and the difference between models on the same text."""

from any4_jax.evaluation.perplexity import Difference, Perplexity, paired_difference, perplexity

__all__ = ["Difference", "Perplexity", "paired_difference", "perplexity"]
