"""Windows of one token stream that don't overlap: what models are measured on, and the error of means over them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from any4_jax.data.passages import PASSAGE_TOKENS, in_common
from any4_jax.surgery import recipe_of

# Short windows are batched up to this many tokens: a program dequantizes the weights once per call, which would
# dominate windows of a few hundred tokens.
_BATCH_TOKENS = 2048
_SEQLEN = 2048

Progress = Callable[[int, int], None]
"""Called with (windows done, windows in total)."""


def cut(
    models: Sequence[Any],
    text_or_ids: Any,
    seqlen: int | None,
    windows: int | None,
    *,
    allow_training_text: bool = False,
) -> np.ndarray:
    """The windows of a text, int32 [windows, seqlen], that all of the models can run on; see `perplexity`.

    Raises:
      ValueError, TypeError: as `perplexity` does, or the models' tokenizers give different tokens.
    """
    seqlen = _checked_seqlen(models, seqlen)
    if windows is not None:
        _check_size("windows", windows, 1, "use None for all")
    ids, *others = (_token_ids(model, text_or_ids) for model in models)
    if any(not np.array_equal(ids, other) for other in others):
        raise ValueError(
            "the models' tokenizers give different tokens for the text, and a comparison needs the same ones; pass "
            "models that share a tokenizer"
        )
    available = len(ids) // seqlen
    wanted = available if windows is None else windows
    if available == 0 or wanted > available:
        raise ValueError(
            f"the text has {len(ids)} tokens, which make {available} windows of {seqlen}, and "
            f"{max(wanted, 1)} are needed; give a longer text, fewer windows, or a smaller seqlen"
        )
    taken = ids[: wanted * seqlen]
    if not allow_training_text:
        _refuse_training_text(models, taken)
    return taken.reshape(wanted, seqlen)


def _refuse_training_text(models: Sequence[Any], ids: np.ndarray) -> None:
    for model in models:
        recipe = recipe_of(model)
        for training in recipe.training if recipe else ():
            if in_common(training.passages, ids):
                raise ValueError(
                    f"got a text with passages of {PASSAGE_TOKENS} tokens that the model was trained on "
                    f"({training.by}), and a measure needs text that is new to it; pass another text, or "
                    "allow_training_text=True (any4 eval --allow-training-text)"
                )


def batches(rows: np.ndarray, progress: Progress | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows [windows, seqlen] in batches of one shape: the numbers of the windows [B], and their tokens [B, seqlen].

    The last batch repeats a window instead of being shorter, so that one program serves all batches.
    """
    wanted, seqlen = rows.shape
    size = min(wanted, max(1, _BATCH_TOKENS // seqlen))
    for first in range(0, wanted, size):
        index = np.minimum(np.arange(first, first + size), wanted - 1)
        yield index, rows[index]
        if progress is not None:
            progress(min(first + size, wanted), wanted)


def resampled_error(
    values: np.ndarray, n: int, seed: int, of: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> float:
    """The standard deviation of `of` the mean over n resamplings with replacement of the windows' values [windows]; 0
    for one window."""
    if len(values) == 1:  # else what is left of rounding
        return 0.0
    index = np.random.default_rng(seed).integers(0, len(values), (n, len(values)))
    return float(of(values[index].mean(axis=1)).std())


def _token_ids(model: Any, text_or_ids: str | Sequence[int] | np.ndarray | jax.Array) -> np.ndarray:
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


def _checked_seqlen(models: Sequence[Any], seqlen: int | None) -> int:
    found = (getattr(getattr(model, "config", None), "max_position_embeddings", None) for model in models)
    context = min((length for length in found if length is not None), default=None)
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
