"""Evaluation: perplexity, the divergence from another model, their errors, the texts of published tables, tasks of
lm-evaluation-harness, and needles found in long texts."""

from any4_jax.evaluation.corpora import CORPORA, Corpus, Tokens, bos_rule, read_corpus
from any4_jax.evaluation.divergence import Divergence, divergence
from any4_jax.evaluation.harness import harness_model
from any4_jax.evaluation.needle import Trial, needle
from any4_jax.evaluation.perplexity import Difference, Perplexity, paired_difference, perplexity

__all__ = [
    "CORPORA",
    "Corpus",
    "Difference",
    "Divergence",
    "Perplexity",
    "Tokens",
    "Trial",
    "bos_rule",
    "divergence",
    "harness_model",
    "needle",
    "paired_difference",
    "perplexity",
    "read_corpus",
]
