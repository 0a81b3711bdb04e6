"""Whether two texts have passages in common: no model is to be judged on text that it was trained on."""

from collections.abc import Iterable, Sequence

import numpy as np

PASSAGE_TOKENS = 64
"""The length of a passage. Different texts hardly share one."""

_MOST = 2048
_DIGITS = 16

# Odd multipliers: one for the polynomial of a passage, two that spread its value over all bits (splitmix64).
_BASE, _FIRST, _SECOND = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def sketch(rows: Iterable[Sequence[int] | np.ndarray]) -> str:
    """What is kept of a text to recognise it by: the least 2,048 hashes of all its passages, as hex digits.

    Args:
      rows: token ids, in rows that don't continue each other.
    """
    found = np.unique(np.concatenate([np.zeros(0, np.uint64), *map(_hashes, rows)]))[:_MOST]
    return "".join(f"{value:0{_DIGITS}x}" for value in found.tolist())


def in_common(sketch: str, ids: Sequence[int] | np.ndarray) -> bool:
    """Whether a text has passages of another one.

    Where the other text has n tokens and shares m passages with this one, about m * min(1, 2048 / n) of them are
    recognised; one is enough.

    Args:
      sketch: of the other text.
      ids: token ids [tokens] of this one, by the same tokenizer.
    """
    known = [int(sketch[i : i + _DIGITS], 16) for i in range(0, len(sketch), _DIGITS)]
    return bool(np.isin(_hashes(ids), np.array(known, np.uint64)).any())


def _hashes(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """A hash for each passage of a row, uint64 [max(0, tokens - 63)]."""
    tokens = np.asarray(ids, np.uint64)
    count = max(0, len(tokens) - PASSAGE_TOKENS + 1)
    value = np.zeros(count, np.uint64)
    for place in range(PASSAGE_TOKENS):
        value = value * _BASE + tokens[place : place + count]
    value = (value ^ (value >> np.uint64(30))) * _FIRST
    value = (value ^ (value >> np.uint64(27))) * _SECOND
    return value ^ (value >> np.uint64(31))
