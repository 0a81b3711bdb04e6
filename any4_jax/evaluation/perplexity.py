"""Perplexity over fixed windows of one token stream, with its sampling error.

The protocol is that of the tables in the GPTQ (arXiv:2210.17323), AWQ (arXiv:2306.00978) and any4
(arXiv:2507.04610) papers. The result is not comparable with perplexity per word, nor with sliding windows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.evaluation.cached import reading
from any4_jax.evaluation.windows import Progress, batches, cut, resampled_error
from any4_jax.kv_cache import CacheFactory


@dataclass(frozen=True, eq=False)
class Perplexity:
    """What `perplexity` measured.

    Attributes:
      window_nll: float64 [windows], the mean cross-entropy of each window in nats per token.
      seqlen: tokens in a window; seqlen - 1 of them are predicted.
    """

    window_nll: np.ndarray
    seqlen: int

    @cached_property
    def nll(self) -> float:
        """The mean of the window means, in nats per token."""
        return float(self.window_nll.mean())

    @property
    def value(self) -> float:
        """The perplexity, exp(nll)."""
        return math.exp(self.nll)

    @property
    def tokens(self) -> int:
        """The number of tokens that were predicted."""
        return len(self.window_nll) * (self.seqlen - 1)

    def bootstrap(self, n: int = 2000, seed: int = 0) -> float:
        """The standard error of `value`, from n resamplings of the windows; 0 if there is one window."""
        return resampled_error(self.window_nll, n, seed, of=np.exp)


class Difference(NamedTuple):
    """A mean difference and its standard error, in nats per token."""

    mean: float
    error: float


def perplexity(
    model: Callable[[jax.Array], jax.Array],
    text_or_ids: str | Sequence[int] | np.ndarray | jax.Array,
    *,
    seqlen: int | None = None,
    windows: int | None = None,
    progress: Progress | None = None,
    cache: CacheFactory | None = None,
    allow_training_text: bool = False,
) -> Perplexity:
    """The perplexity of `model` on a text.

    The whole text is tokenized once and cut into floor(tokens / seqlen) windows that don't overlap; the rest is
    dropped. A window's loss is the mean cross-entropy of its last seqlen - 1 tokens, each given those before it; the
    perplexity is exp of the mean over windows. The softmax is computed in float32.

    Args:
      model: maps int32 tokens [B, T] to logits [B, T, V]. A text needs its `.tokenizer`.
      text_or_ids: a text, or integer token ids [tokens].
      seqlen: tokens in a window, at least 2; None means 2048, or the model's context if that is shorter.
      windows: how many windows to use, from the first on, at least 1; None takes all.
      progress: called with (windows done, windows in total).
      cache: a cache to read keys and values from, such as `kv_cache.Kivi(bits=2)`: what each token sees has the errors
        that it would have if the tokens came one by one. None takes the model as it is, with the cache that its
        checkpoint names, if any.
      allow_training_text: whether the text may have passages that the model was trained on, by `any4_jax.tune` or a
        method that trains blocks.

    Raises:
      ValueError: the text is too short for the windows, `seqlen` is below 2, `windows` below 1, a window exceeds the
        model's context, a token is outside of its vocabulary, or the model was trained on passages of the text.
      TypeError: the ids are not one row of integers, a text is given for a model without a tokenizer, `seqlen` or
        `windows` is no integer, or there is a cache for a model that is no Decoder.
    """
    rows = cut((model,), text_or_ids, seqlen, windows, allow_training_text=allow_training_text)
    run, window_nll = reading(model, cache), np.empty(len(rows), np.float64)
    for index, batch in batches(rows, progress):
        tokens = jnp.asarray(batch)
        losses = np.asarray(_cross_entropy(run(tokens), tokens), np.float64)  # [batch, seqlen - 1]
        window_nll[index] = losses.mean(axis=1)
    return Perplexity(window_nll, rows.shape[1])


def paired_difference(a: Perplexity, b: Perplexity, n: int = 2000, seed: int = 0) -> Difference:
    """How many nats per token `a` loses against `b`, window by window, and the bootstrap error of that.

    The windows of a text differ far more from each other than two models do on one window, so this error is much
    smaller than that of either perplexity. It is meaningful only if the text and the tokenizer are the same.

    Raises:
      ValueError: the two were not measured on equally many windows of equal length.
    """
    if a.window_nll.shape != b.window_nll.shape or a.seqlen != b.seqlen:
        raise ValueError(
            f"got {len(a.window_nll)} windows of {a.seqlen} tokens and {len(b.window_nll)} of {b.seqlen}; "
            "a paired difference needs the same windows, so measure both with the same text and seqlen"
        )
    difference = a.window_nll - b.window_nll
    return Difference(float(difference.mean()), resampled_error(difference, n, seed))


@jax.jit
def _cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """-log p(tokens[:, t + 1]) from logits[:, t]: [B, T, V], [B, T] -> float32 [B, T - 1]."""
    predicted = logits[:, :-1].astype(jnp.float32)
    # Two reductions instead of log_softmax, which would create a second array as large as the logits.
    log_total = jax.nn.logsumexp(predicted, axis=-1)
    chosen = jnp.take_along_axis(predicted, tokens[:, 1:, None], axis=-1)[..., 0]
    return log_total - chosen
