"""The forms that a prompt may have, as rows of token ids; and the ids that end a row."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from any4_jax.generate.arguments import integer
from any4_jax.generate.sampling import INVALID
from any4_jax.models.base import Decoder

TokenIds = Sequence[int] | np.ndarray
Message = Mapping[str, Any]
Chat = Sequence[Message]
Prompt = str | Sequence[str] | Chat | Sequence[Chat] | TokenIds | Sequence[TokenIds]

# End-of-text ids are padded to at least this many, so that programs don't depend on their number.
END_SLOTS = 8

_FORMS = "pass a text, a chat (a list of messages), token ids, or a list of any one of these"


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts as rows of token ids.

    Attributes:
        rows: the token ids of each.
        is_text: whether they were texts or chats, so that continuations are texts.
        is_batch: whether there was a list of prompts.
    """

    rows: list[Any]
    is_text: bool
    is_batch: bool

    @classmethod
    def of(cls, model: Decoder, prompt: Any) -> "Prompts":
        """Reads a prompt of any form; token ids are checked later, by `checked_rows`.

        Raises:
            TypeError: the prompt has none of the forms.
            ValueError: it is empty, or the model has no tokenizer or chat template for it.
        """
        if not isinstance(model, Decoder):
            raise TypeError(f"the model is a {type(model).__name__}, and a Decoder is needed; use any4_jax.models.load")
        if isinstance(prompt, str):
            return cls([_encoded(model, prompt)], True, False)
        if isinstance(prompt, bytes | bytearray | memoryview):
            raise TypeError(f"the prompt is {type(prompt).__name__}; decode it to a str")
        if isinstance(prompt, np.ndarray | jax.Array):
            prompt = np.asarray(prompt) if prompt.ndim else prompt.item()
        if not isinstance(prompt, Sequence | np.ndarray):
            raise TypeError(f"the prompt is a {type(prompt).__name__}; {_FORMS}")
        kinds = {_kind(item) for item in prompt}
        if not kinds:
            raise ValueError("the prompt is empty; pass at least one token")
        if len(kinds) > 1:
            raise TypeError(f"the prompt is a list of {' and '.join(sorted(kinds))}; {_FORMS}")
        (kind,) = kinds
        if kind == "bytes":
            raise TypeError("the prompt is a list of bytes; decode each to a str")
        if kind == "texts":
            return cls([_encoded(model, item) for item in prompt], True, True)
        if kind == "messages":
            return cls([_encoded_chat(model, list(prompt))], True, False)
        if kind == "chats":
            return cls([_encoded_chat(model, item) for item in prompt], True, True)
        return cls([prompt], False, False) if kind == "ids" else cls(list(prompt), False, True)


def checked_rows(model: Decoder, prompts: Sequence[TokenIds]) -> list[np.ndarray]:
    """Prompts of token ids as integer arrays [T].

    Raises:
        TypeError: ids are no integers.
        ValueError: there is no prompt, a prompt is empty, or an id is outside the vocabulary.
    """
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        raise TypeError(f"the prompts are a {type(prompts).__name__}, and a list of lists of token ids is needed")
    rows = [_checked_row(model, row) for row in prompts]
    if not rows:
        raise ValueError("the list of prompts is empty; pass at least one prompt")
    return rows


def end_ids(model: Decoder, eos: Any) -> np.ndarray:
    """The ids that end a row: int32 [END_SLOTS or more], padded with INVALID, so that this ends a row too.

    Args:
        eos: an id or several; None takes those of the model and its tokenizer.

    Raises:
        TypeError: an id is no integer.
        ValueError: an id is outside the vocabulary.
    """
    last = model.config.vocab_size - 1
    if eos is None:
        own = {*model.config.eos_token_ids, *(() if model.tokenizer is None else model.tokenizer.eos_ids)}
        # Files may name an id that the model has no row for, and that therefore never comes.
        ids = {i for i in own if 0 <= i <= last}
    else:
        if isinstance(eos, str | bytes | Mapping):
            raise TypeError(f"eos is {eos!r}, and an id or a list of ids is needed; to end at a text, use stop")
        given = np.asarray(eos).tolist() if isinstance(eos, np.ndarray | jax.Array) else eos
        given = given if isinstance(given, Iterable) else [given]
        ids = {integer("eos", i, 0, last, ", as the model's vocabulary has no other") for i in given}
    padded = np.full(max(END_SLOTS, len(ids) + 1), INVALID, np.int32)
    padded[: len(ids)] = sorted(ids)
    return padded


def _kind(item: Any) -> str:
    """What a prompt with this item is a list of."""
    if isinstance(item, str):
        return "texts"
    if isinstance(item, Mapping):
        return "messages"
    if isinstance(item, bytes | bytearray):
        return "bytes"
    if isinstance(item, Sequence) and item and all(isinstance(part, Mapping) for part in item):
        return "chats"
    if isinstance(item, Sequence):
        return "lists of ids"
    return "ids" if np.ndim(item) == 0 else "lists of ids"


def _encoded(model: Decoder, text: str) -> list[int]:
    _needs_tokenizer(model)
    if not text:
        raise ValueError("the prompt is empty; pass at least one character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt holds {text[error.start]!r}, which is no character; read it as UTF-8") from None
    return list(model.tokenizer.encode(text))


def _encoded_chat(model: Decoder, messages: Chat) -> list[int]:
    _needs_tokenizer(model)
    for i, message in enumerate(messages):
        missing = [key for key in ("role", "content") if key not in message]
        if missing:
            raise ValueError(f"message {i} of the chat has no {missing[0]!r}; each message needs a role and a content")
    if getattr(model.tokenizer, "chat_template", None) is None:
        raise ValueError("the prompt is a chat, and the model's tokenizer has no chat template; pass a text instead")
    return list(model.tokenizer.encode_chat(messages))


def _needs_tokenizer(model: Decoder) -> None:
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer; set model.tokenizer or pass token ids")


def _checked_row(model: Decoder, row: TokenIds) -> np.ndarray:
    try:
        ids = np.asarray(row)
    except ValueError:
        raise ValueError("a prompt holds lists of several lengths, and a list of token ids is needed") from None
    if ids.ndim != 1 or ids.size == 0:
        raise ValueError(f"a prompt has shape {ids.shape}, and a non-empty list of token ids is needed; add a token")
    # numpy makes an integer of a bool that stands among integers.
    kind = "bool" if ids is not row and any(isinstance(i, bool) for i in row) else ids.dtype
    if kind == "bool" or not np.issubdtype(kind, np.integer):
        raise TypeError(f"a prompt holds {kind}, and integer token ids are needed; encode the text first")
    if ids.min() < 0 or ids.max() >= model.config.vocab_size:
        raise ValueError(
            f"token ids are in {ids.min()}..{ids.max()}, and the vocabulary is "
            f"0..{model.config.vocab_size - 1}; use the model's own tokenizer"
        )
    return ids
