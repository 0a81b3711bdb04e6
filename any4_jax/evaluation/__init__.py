"""Evaluation: perplexity, the divergence from another model, errors of both, errors by layer, what methods do to each,
the texts of published tables, tasks of lm-evaluation-harness, and needles found in long texts."""

from any4_jax.evaluation.analysis import Analysis, analyze
from any4_jax.evaluation.corpora import CORPORA, Corpus, Tokens, bos_rule, read_corpus
from any4_jax.evaluation.divergence import Divergence, divergence
from any4_jax.evaluation.harness import harness_model
from any4_jax.evaluation.layer_errors import Deviation, LayerError, LayerErrors, layer_errors
from any4_jax.evaluation.needle import Trial, needle
from any4_jax.evaluation.perplexity import Difference, Perplexity, paired_difference, perplexity

__all__ = [
    "Analysis",
    "CORPORA",
    "Corpus",
    "Deviation",
    "Difference",
    "Divergence",
    "LayerError",
    "LayerErrors",
    "Perplexity",
    "Tokens",
    "Trial",
    "analyze",
    "bos_rule",
    "divergence",
    "harness_model",
    "layer_errors",
    "needle",
    "paired_difference",
    "perplexity",
    "read_corpus",
]
