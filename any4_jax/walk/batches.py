"""Calibration data: from any of its forms to padded batches of tokens."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

_FORMS = "texts, lists of token ids, or [B, T] arrays of them"
_LONGEST_NAME = 1000

Batch = tuple[np.ndarray, np.ndarray]
"""Tokens int32 [B, T] and a mask bool [B, T] that is False on padding."""


def token_batches(model, data, batch_size: int, seqlen: int) -> list[Batch]:
    """Pieces of at most `seqlen` tokens, padded on the right to the longest of their batch and masked there.

    Args:
      model: has a `config` and, where data is text, a `tokenizer`.
      data: see `calibrate`.
      batch_size: sequences in a batch.
      seqlen: the longest piece, in tokens; a shorter context of the model takes its place.

    Raises:
      ValueError: there is no token, a token is outside of the vocabulary, the data has another form, mixes texts and
        ids or names a file, or it is text and the model has no tokenizer; a size is below 1.
      TypeError: the data can't be iterated over.
    """
    if batch_size < 1 or seqlen < 1:
        raise ValueError(f"got batch_size={batch_size} and seqlen={seqlen}, both must be at least 1; pass larger ones")
    seqlen = min(seqlen, getattr(model.config, "max_position_embeddings", seqlen))
    pieces = [row[i : i + seqlen] for row in _sequences(model, data) for i in range(0, len(row), seqlen)]
    if not pieces:
        raise ValueError("got no calibration text or tokens, need at least one token; pass some text")
    pieces.sort(key=len)
    batches = []
    for i in range(0, len(pieces), batch_size):
        rows = pieces[i : i + batch_size]
        tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for j, row in enumerate(rows):
            tokens[j, : len(row)] = row
            mask[j, : len(row)] = True
        batches.append((tokens, mask))
    return batches


def _sequences(model, data) -> list[np.ndarray]:
    """The token sequences in any of the forms of data that `calibrate` takes."""
    rows: list[np.ndarray] = []
    if not isinstance(data, Iterable) or isinstance(data, bytes | Mapping):
        raise TypeError(f"got calibration data of type {type(data).__name__}; pass {_FORMS}")
    items = [data] if isinstance(data, str) else list(data)
    texts = [item for item in items if isinstance(item, str)]
    if texts and len(texts) < len(items):
        raise ValueError(
            f"got {len(texts)} texts and {len(items) - len(texts)} lists of token ids as calibration data, need one "
            "kind; encode the texts with the model's tokenizer"
        )
    for item in items:
        if isinstance(item, str):
            _refuse_file_name(item)
            # Encoding "" would give a beginning-of-text token alone, and statistics of nothing else.
            if not item.strip():
                continue
            if getattr(model, "tokenizer", None) is None:
                raise ValueError("got text for a model without a tokenizer; pass token ids")
            rows.append(np.asarray(model.tokenizer.encode(item), np.int32))
            continue
        try:
            array = np.asarray(item)
        except ValueError:  # rows of different lengths within an item
            array = np.asarray(item, object)
        if array.size == 0:  # of no dtype that means anything: numpy makes floats of []
            continue
        if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (1, 2):
            raise ValueError(f"got calibration data of dtype {array.dtype} and shape {array.shape}; pass {_FORMS}")
        rows += list(np.atleast_2d(array))
    top = max((int(row.max(initial=0)) for row in rows), default=0)
    low = min((int(row.min(initial=0)) for row in rows), default=0)
    if top >= model.config.vocab_size or low < 0:
        raise ValueError(
            f"got token ids from {low} to {top}, the vocabulary has {model.config.vocab_size}; use its tokenizer"
        )
    return [row.astype(np.int32) for row in rows]


def _refuse_file_name(text: str) -> None:
    """Raises ValueError for a text that is the name of a file: so short a text is hardly meant to be calibrated on."""
    if len(text) > _LONGEST_NAME or len(text.splitlines()) != 1:
        return
    try:
        found = Path(text).is_file()
    except (OSError, ValueError):
        return
    if found:
        raise ValueError(f"got the calibration text {text!r}, which is the name of a file; pass its text")
