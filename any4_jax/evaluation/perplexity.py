"""Perplexity over fixed windows of one token stream, with its sampling error.

The protocol is that of the tables in the GPTQ (arXiv:2210.17323), AWQ (arXiv:2306.00978) and any4
(arXiv:2507.04610) papers. The result is not comparable with perplexity per word, nor with sliding windows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Short windows are batched up to this many tokens: the program dequantizes the weights once per call, which would
# dominate windows of a few hundred tokens.
_BATCH_TOKENS = 2048
_SEQLEN = 2048


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
        return float(np.exp(_resampled_means(self.window_nll, n, seed)).std())


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
    progress: Callable[[int, int], None] | None = None,
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

    Raises:
      ValueError: the text is too short for the windows, `seqlen` is below 2, `windows` below 1, a window exceeds the
        model's context, or a token is outside of its vocabulary.
      TypeError: the ids are not one row of integers, a text is given for a model without a tokenizer, or `seqlen` or
        `windows` is no integer.
    """
    seqlen = _checked_seqlen(model, seqlen)
    if windows is not None:
        _check_size("windows", windows, 1, "use None for all")
    ids = _token_ids(model, text_or_ids)
    available = len(ids) // seqlen
    wanted = available if windows is None else windows
    if available == 0 or wanted > available:
        raise ValueError(
            f"the text has {len(ids)} tokens, which make {available} windows of {seqlen}, and "
            f"{max(wanted, 1)} are needed; give a longer text, fewer windows, or a smaller seqlen"
        )
    rows = ids[: wanted * seqlen].reshape(wanted, seqlen)
    batch = min(wanted, max(1, _BATCH_TOKENS // seqlen))

    window_nll = np.empty(wanted, np.float64)
    for first in range(0, wanted, batch):
        # The last batch repeats a window instead of being shorter, so that one program serves all batches.
        index = np.minimum(np.arange(first, first + batch), wanted - 1)
        tokens = jnp.asarray(rows[index])
        losses = np.asarray(_cross_entropy(model(tokens), tokens), np.float64)  # [batch, seqlen - 1]
        window_nll[index] = losses.mean(axis=1)
        if progress is not None:
            progress(min(first + batch, wanted), wanted)
    return Perplexity(window_nll, seqlen)


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
    return Difference(float(difference.mean()), float(_resampled_means(difference, n, seed).std()))


@jax.jit
def _cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """-log p(tokens[:, t + 1]) from logits[:, t]: [B, T, V], [B, T] -> float32 [B, T - 1]."""
    predicted = logits[:, :-1].astype(jnp.float32)
    # Two reductions instead of log_softmax, which would create a second array as large as the logits.
    log_total = jax.nn.logsumexp(predicted, axis=-1)
    chosen = jnp.take_along_axis(predicted, tokens[:, 1:, None], axis=-1)[..., 0]
    return log_total - chosen


def _token_ids(model: Any, text_or_ids: Any) -> np.ndarray:
    if isinstance(text_or_ids, str):
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise TypeError("got a text for a model without a tokenizer; pass token ids instead")
        return np.asarray(tokenizer.encode(text_or_ids), np.int32)
    ids = np.asarray(text_or_ids)
    if ids.size == 0:  # of no dtype that means anything: numpy makes floats of []
        return np.zeros(0, np.int32)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"got token ids of shape {ids.shape} and dtype {ids.dtype}; pass one row of integers")
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    low, top = int(ids.min(initial=0)), int(ids.max(initial=0))
    if low < 0 or (vocabulary is not None and top >= vocabulary):
        raise ValueError(
            f"got token ids from {low} to {top}, the vocabulary has {vocabulary or 'none below 0'}; use its tokenizer"
        )
    return ids.astype(np.int32)


def _checked_seqlen(model: Any, seqlen: int | None) -> int:
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if seqlen is None:
        return _SEQLEN if context is None else min(_SEQLEN, context)
    _check_size("seqlen", seqlen, 2, "a window needs 2 tokens to predict one")
    if context is not None and seqlen > context:
        raise ValueError(f"seqlen={seqlen} is longer than the model's context of {context}; pass a smaller seqlen")
    return seqlen


def _check_size(name: str, value: Any, least: int, why: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}, and an integer is needed; {why}")
    if value < least:
        raise ValueError(f"{name}={value}, and at least {least} is needed; {why}")


def _resampled_means(values: np.ndarray, n: int, seed: int) -> np.ndarray:
    """The means of n resamplings with replacement: [windows] -> [n]."""
    index = np.random.default_rng(seed).integers(0, len(values), (n, len(values)))
    return values[index].mean(axis=1)
