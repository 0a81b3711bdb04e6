"""Needle in a haystack: does a model find a fact that is hidden in a long text, wherever it is?"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from any4_jax.evaluation.windows import Progress
from any4_jax.generate import TextStream, generate_tokens
from any4_jax.kv_cache import CacheFactory
from any4_jax.models.base import Decoder

KEYS = ("47x291", "8a3605", "1294k8", "590p37", "68v423")
"""The published pass keys."""

_BEGIN = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there.\n"
)
_NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
# Without a space at the end, which most tokenizers make part of the word that follows.
_QUESTION = "\nWhat is the pass key? The pass key is"
_ENDS = (".", "!", "?", "\n")
_SPARE = 4
"""New tokens beyond those of the key: for a space, a quote or the like before it."""
_BATCH_TOKENS = 16384


@dataclasses.dataclass(frozen=True)
class Trial:
    """A needle in a haystack.

    Attributes:
      length: tokens of the prompt.
      depth: where in the haystack the needle is, from 0 (begin) to 1.
      key: what is asked for.
      answer: the model's text.
    """

    length: int
    depth: float
    key: str
    answer: str

    @property
    def found(self) -> bool:
        """Whether the answer contains the key."""
        return self.key in self.answer


def needle(
    model: Decoder,
    haystack: str,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    keys: Sequence[str] = KEYS,
    cache: CacheFactory | None = None,
    progress: Progress | None = None,
) -> list[Trial]:
    """Hides each key at each depth of a text of each length, asks for it, and takes the likeliest tokens for an answer.

    The prompt is continued as it is, without a chat template, as published. It has exactly so many tokens as asked for;
    the haystack is repeated or cut to fill it, and the needle stands after a sentence, the last that ends before its
    depth.

    Args:
      model: with a tokenizer.
      haystack: a text that doesn't contain the keys.
      lengths: tokens of the prompts.
      depths: from 0 to 1.
      keys: what is hidden, each in prompts of its own.
      cache: creates the caches, such as `kv_cache.Kivi(bits=2)`; None for the model's own, which is the plain one
        unless its checkpoint names another. Tokens of a prompt see each other as the cache has it for a generation.
      progress: called with (trials done, trials in total).

    Returns:
      A trial for each length, depth and key, in this order.

    Raises:
      ValueError: a length exceeds the model's context or is too short for the question; a depth is not from 0 to 1; the
        haystack is empty or contains a key; there are none of lengths, depths or keys; or the model has no tokenizer.
    """
    prompts = _Prompts.of(model, haystack, keys)
    for name, given in (("lengths", lengths), ("depths", depths), ("keys", keys)):
        if not len(given):
            raise ValueError(f"got no {name}, and at least one is needed; give one")
    for length in lengths:
        prompts.check(length, model.config.max_position_embeddings)
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"got the depth {depth}, and 0 (begin of the text) to 1 (end) is needed; give a share")
    trials: list[Trial] = []
    total = len(lengths) * len(depths) * len(keys)
    for length in lengths:
        places = [(depth, key) for depth in depths for key in keys]
        size = min(len(places), max(1, _BATCH_TOKENS // length))
        for first in range(0, len(places), size):
            batch = places[first : first + size]
            # The last batch repeats a row instead of being shorter, so that one program serves all batches.
            rows = [prompts.tokens(length, *place) for place in [*batch, *batch[-1:] * (size - len(batch))]]
            answers = _answers(model, rows, prompts.new, cache)
            trials += [Trial(length, *place, answer) for place, answer in zip(batch, answers, strict=False)]
            if progress is not None:
                progress(len(trials), total)
    return trials


def shares(trials: Sequence[Trial]) -> tuple[list[int], list[float], np.ndarray]:
    """The lengths and the depths of trials, ascending, and the share of needles found, float64 [depths, lengths]."""
    lengths, depths = sorted({trial.length for trial in trials}), sorted({trial.depth for trial in trials})
    found = np.zeros((len(depths), len(lengths)))
    for i, depth in enumerate(depths):
        for j, length in enumerate(lengths):
            found[i, j] = np.mean([one.found for one in trials if (one.length, one.depth) == (length, depth)])
    return lengths, depths, found


@dataclasses.dataclass(frozen=True)
class _Prompts:
    """What prompts are made of, as token ids.

    Attributes:
      begin: with the BOS that the tokenizer adds.
      needles: by key.
      question: ends the prompt.
      hay: the haystack.
      ends: the places in `hay` after which a sentence ends, ascending.
      new: how many new tokens an answer may need.
    """

    begin: list[int]
    needles: dict[str, list[int]]
    question: list[int]
    hay: list[int]
    ends: np.ndarray
    new: int

    @classmethod
    def of(cls, model: Decoder, haystack: str, keys: Sequence[str]) -> "_Prompts":
        tokenizer: Any = model.tokenizer
        if tokenizer is None:
            raise ValueError("the model has no tokenizer, and a haystack is a text; set model.tokenizer")
        if not haystack.strip():
            raise ValueError("the haystack is empty; give a text of a few sentences")
        if hidden := [key for key in keys if key in haystack]:
            raise ValueError(f"the haystack contains the key {hidden[0]!r}, so finding it proves nothing; change one")

        def encoded(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_bos=False))

        first = list(tokenizer.encode(_BEGIN))[:1]
        bos = first if first == [tokenizer.bos_id] else []
        hay = encoded(f"{haystack.strip()}\n")
        # Special characters of bytes and the like have no end of a sentence; a comma in 3.14 does no harm.
        ends = [i + 1 for i, token in enumerate(hay) if tokenizer.decode([token]).endswith(_ENDS)]
        return cls(
            bos + encoded(_BEGIN),
            {key: encoded(_NEEDLE.format(key=key)) for key in keys},
            encoded(_QUESTION),
            hay,
            np.asarray([0, *ends]),
            _SPARE + max((len(encoded(key)) for key in keys), default=0),
        )

    def check(self, length: int, context: int) -> None:
        """Raises ValueError if there are no prompts of `length` tokens."""
        least = self._fixed(max(map(len, self.needles.values()))) + 1
        if length < least:
            raise ValueError(f"got a length of {length} tokens, and the question alone has {least - 1}; give more")
        if length + self.new > context:
            raise ValueError(
                f"got a length of {length} tokens, which with {self.new} of the answer exceed the model's context of "
                f"{context}; give at most {context - self.new}"
            )

    def tokens(self, length: int, depth: float, key: str) -> list[int]:
        """The prompt, of `length` tokens."""
        needle = self.needles[key]
        room = length - self._fixed(len(needle))
        hay = (self.hay * -(-room // len(self.hay)))[:room]
        rounds, within = divmod(round(depth * room), len(self.hay))
        place = rounds * len(self.hay) + int(self.ends[np.searchsorted(self.ends, within, side="right") - 1])
        # At the end of the text, a sentence that is cut off is still one.
        place = room if depth == 1 else place
        return [*self.begin, *hay[:place], *needle, *hay[place:], *self.question]

    def _fixed(self, needle: int) -> int:
        return len(self.begin) + needle + len(self.question)


def _answers(model: Decoder, rows: list[list[int]], new: int, cache: CacheFactory | None) -> list[str]:
    added: list[list[int]] = [[] for _ in rows]
    for chunk in generate_tokens(model, rows, max_new_tokens=new, cache=cache):
        for row, tokens in zip(added, chunk, strict=True):
            row += tokens
    tokenizer: Any = model.tokenizer
    return [TextStream.whole(tokenizer.decode, row, new) for row, new in zip(rows, added, strict=True)]
