"""`generate`: continues prompts of any form, and returns continuations of the same form."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from any4_jax.generate.loop import CHUNK, TokenIds, generate_tokens
from any4_jax.generate.streaming import TextStream
from any4_jax.kv_cache import CacheFactory, DenseCache
from any4_jax.models.base import Decoder

# Streamed text comes in smaller chunks: a reader notices when 16 tokens come at once, but not 4.
STREAM_CHUNK = 4

Prompt = str | Sequence[str] | TokenIds | Sequence[TokenIds]


def generate(
    model: Decoder,
    prompt: Prompt,
    *,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos: int | Sequence[int] | None = None,
    stream: Callable[[str], None] | None = None,
    cache: CacheFactory = DenseCache,
) -> Any:
    """Continues one prompt or several.

    Args:
        model: the model; a text prompt needs its `tokenizer`.
        prompt: a text, a list of texts, token ids, or a list of token ids (of any lengths).
        max_new_tokens: the most new tokens per row.
        temperature: 0 takes the likeliest token; above 0, tokens are sampled from softmax(logits / temperature).
        top_k: sample among this many likeliest tokens; None means all.
        top_p: sample among the likeliest tokens that together have this probability; None means all.
        seed: of the sampling; equal seeds give equal tokens.
        eos: ids that end a row; None takes the model's own, () never stops early.
        stream: called with each piece of text as it is decoded; needs a single text prompt.
        cache: creates the key/value caches (see `kv_cache.CacheFactory`).

    Returns:
        The continuation, without the prompt, the end-of-text token and anything after it: str for a text,
        list[str] for texts, list[int] for token ids, list[list[int]] for a list of token ids.

    Raises:
        TypeError: the prompt is neither text nor integer token ids, or `cache` is neither a pytree nor hashable.
        ValueError: a prompt is empty, a prompt with its new tokens exceeds the context, a token id is outside the
            vocabulary, the model has no tokenizer for a text, or a sampling setting is out of range.
    """
    rows, is_text, is_batch = _rows(model, prompt)
    if stream is not None and (not is_text or is_batch):
        raise ValueError("stream needs one text prompt; pass a single str, or leave stream out")
    text = TextStream(model.tokenizer.decode, rows[0], stream) if stream is not None else None
    new: list[list[int]] = [[] for _ in rows]
    for chunk in generate_tokens(
        model,
        rows,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos=eos,
        cache=cache,
        chunk=CHUNK if text is None else STREAM_CHUNK,
    ):
        for row, tokens in zip(new, chunk, strict=True):
            row.extend(tokens)
        if text is not None:
            text.extend(chunk[0])
    if text is not None:
        return text.finish()
    if not is_text:
        return new if is_batch else new[0]
    texts = [TextStream.whole(model.tokenizer.decode, old, row) for old, row in zip(rows, new, strict=True)]
    return texts if is_batch else texts[0]


def _rows(model: Decoder, prompt: Prompt) -> tuple[list[Any], bool, bool]:
    """The prompt as rows of token ids, whether it was text, and whether it was a batch."""
    if isinstance(prompt, str):
        return [_encode(model, prompt)], True, False
    if not isinstance(prompt, Sequence | np.ndarray | jax.Array):
        raise TypeError(f"the prompt is a {type(prompt).__name__}; pass a text, token ids, or a list of either")
    if len(prompt) == 0:
        raise ValueError("the prompt is empty; pass at least one token")
    if all(isinstance(item, str) for item in prompt):
        return [_encode(model, str(item)) for item in prompt], True, True
    if all(np.ndim(item) == 0 and not isinstance(item, str) for item in prompt):
        return [prompt], False, False
    return list(prompt), False, True


def _encode(model: Decoder, text: str) -> list[int]:
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer; set model.tokenizer or pass token ids")
    if not text:
        raise ValueError("the prompt is empty; pass at least one character")
    return model.tokenizer.encode(text)
