"""Pieces of a long text for calibration."""

from collections.abc import Sequence

import numpy as np


def pieces(ids: Sequence[int] | np.ndarray, samples: int, length: int) -> np.ndarray:
    """`samples` pieces of `length` tokens, spread evenly over a text: int32 [samples, length].

    The first starts where the text starts, and the last ends where it ends. They overlap where the text is shorter
    than all of them.

    Args:
      ids: the tokens of the text, [tokens].
      samples: at least 1.
      length: at least 1, at most the number of tokens.

    Raises:
      ValueError: the text has fewer tokens than a piece, or a number is below 1.
    """
    tokens = np.asarray(ids, np.int32)
    if samples < 1 or length < 1:
        raise ValueError(f"got {samples} samples of {length} tokens, need at least 1 of each; pass larger numbers")
    if len(tokens) < length:
        raise ValueError(
            f"got a text of {len(tokens)} tokens, need at least the {length} of one piece; pass a longer text or a "
            "smaller length"
        )
    starts = np.linspace(0, len(tokens) - length, samples).astype(int)
    return np.stack([tokens[start : start + length] for start in starts])
