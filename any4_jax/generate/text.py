"""`generate`: continues prompts of any form, and returns continuations of the same form."""

from collections.abc import Callable, Sequence
from typing import Any

from any4_jax.generate.arguments import integer
from any4_jax.generate.chunk import Chunk, Continuation, FinishReason
from any4_jax.generate.decoding import Decode
from any4_jax.generate.loop import CHUNK, generate_chunks
from any4_jax.generate.prompts import Prompt, Prompts
from any4_jax.generate.streaming import TextStream
from any4_jax.kv_cache import CacheFactory
from any4_jax.models.base import Decoder

# Streamed text comes in smaller chunks: a reader notices when 16 tokens come at once, but not 4. And after a stop
# string, fewer tokens are decoded in vain.
STREAM_CHUNK = 4


def generate(
    model: Decoder,
    prompt: Prompt,
    *,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    seed: int | None = None,
    n: int = 1,
    eos: int | Sequence[int] | None = None,
    stop: str | Sequence[str] = (),
    logprobs: int | None = None,
    stream: Callable[[str], object] | None = None,
    cache: CacheFactory | None = None,
) -> Any:
    """Continues one prompt or several.

    The limits top_k, top_p and min_p apply in this order, as in `transformers`, to softmax(logits / temperature).

    Args:
        model: the model; a text prompt needs its `tokenizer`, a chat a tokenizer with a chat template.
        prompt: a text, a chat (a list of messages such as {"role": "user", "content": "Hello"}), token ids, or a list
            of any one of these (of any lengths).
        max_new_tokens: the most new tokens per row.
        temperature: 0 takes the likeliest token; from 1e-5, tokens are sampled from softmax(logits / temperature).
        top_k: sample among this many likeliest tokens; None means all.
        top_p: sample among the likeliest tokens that together have this probability; None means all.
        min_p: sample among the tokens that have at least this share of the likeliest token's probability; None means
            all.
        repetition_penalty: the logits of tokens in the prompt or the new text are divided by this where above 0, and
            multiplied where below (as in `transformers` and vLLM); 1 changes nothing.
        frequency_penalty: subtracted from a token's logit for each time that it is in the new text, -2 to 2 (as in
            vLLM).
        presence_penalty: subtracted from a token's logit if it is in the new text (as in vLLM); -2 to 2.
        seed: of the sampling, any integer, taken modulo 2**64; None is 0. Equal seeds give equal tokens for equal
            prompts in a batch of equal size.
        n: the number of continuations of each prompt, sampled independently.
        eos: ids that end a row; None takes the model's own, () never stops early.
        stop: texts that end a text or chat prompt's continuation, which ends before the first of them.
        logprobs: None, or how many alternatives to tell at each new token, 0 to 20. Then the results are
            `Continuation`s with log-probabilities, alternatives and the reason for the end.
        stream: called with each piece of text as it is decoded; needs a single text or chat, and n = 1. The pieces
            together are the text that is returned.
        cache: creates the key/value caches (see `kv_cache.CacheFactory`); None takes the model's own, `model.cache`,
            which is the plain one unless its checkpoint names another.

    Returns:
        The continuation, without the prompt, the end-of-text token or stop string and anything after it: str for a text
        or chat, list[str] for several, list[int] for token ids, list[list[int]] for a list of token ids. With n > 1,
        each is a list of n of these; with `logprobs`, each is a `Continuation`.

    Raises:
        TypeError: the prompt or an argument is not of a kind named above, or `cache` is neither a pytree nor hashable.
        ValueError: a prompt is empty, a prompt with its new tokens exceeds the context, a token id is outside the
            vocabulary, the model has no tokenizer for a text or no chat template for a chat; a setting is out of range,
            or would be ignored because the temperature is 0; or the logits are NaN.
    """
    prompts = Prompts.of(model, prompt)
    stops = stop_strings(stop)
    n = integer("n", n, 1)
    if n > 1 and temperature == 0:
        raise ValueError(f"n is {n}, and with temperature 0 all {n} would be equal; set a temperature above 0")
    if stream is not None and not callable(stream):
        raise TypeError(f"stream is a {type(stream).__name__}, and a function that takes a str is needed; pass print")
    if stream is not None and (not prompts.is_text or prompts.is_batch or n > 1):
        raise ValueError("stream needs one text prompt and n = 1; pass a single str, or leave stream out")
    if stops and not prompts.is_text:
        raise ValueError("stop needs text prompts, and token ids were given; use eos, or pass texts")
    rows = [row for row in prompts.rows for _ in range(n)]
    decode = model.tokenizer.decode if prompts.is_text else None
    collected = [_Collected(decode, row, stream, stops) for row in rows]
    for chunk in generate_chunks(
        model,
        rows,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        seed=seed,
        eos=eos,
        logprobs=logprobs,
        cache=cache,
        chunk=STREAM_CHUNK if stream is not None or stops else CHUNK,
    ):
        for row, each in enumerate(collected):
            each.extend(chunk, row)
        if all(each.reason is not None for each in collected):
            break
    results = [each.finish(logprobs is not None) for each in collected]
    grouped = [results[i : i + n] if n > 1 else results[i] for i in range(0, len(results), n)]
    return grouped if prompts.is_batch else grouped[0]


class _Collected:
    """One continuation as it grows; `reason` is None until it has ended."""

    def __init__(
        self, decode: Decode | None, prompt: Any, emit: Callable[[str], object] | None, stop: Sequence[str]
    ) -> None:
        self._text = None if decode is None else TextStream(decode, prompt, emit or (lambda piece: None), stop)
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._alternatives: list[dict[int, float]] = []
        self.reason: FinishReason | None = None

    def extend(self, chunk: Chunk, row: int) -> None:
        """Adds what the chunk has for a row, unless it has ended."""
        if self.reason is not None:
            return
        tokens, before = chunk.tokens[row], len(self._tokens)
        self.reason = chunk.finish_reasons[row]
        if self._text is not None:
            self._text.extend(tokens)
            if self._text.stopped:
                tokens, self.reason = self._text.tokens[before:], "stop"
        self._tokens += tokens
        self._logprobs += chunk.logprobs[row][: len(tokens)]
        self._alternatives += chunk.alternatives[row][: len(tokens)]

    def finish(self, details: bool) -> Any:
        """The result: text, tokens, or both with details."""
        text = None if self._text is None else self._text.finish()
        if details:
            reason = self.reason or "length"
            if self._text is not None and self._text.stopped:
                reason = "stop"
            return Continuation(text, self._tokens, self._logprobs, self._alternatives, reason)
        return self._tokens if text is None else text


def stop_strings(stop: Any) -> tuple[str, ...]:
    """The texts of an argument `stop`.

    Raises:
        TypeError: it is neither a text nor several.
        ValueError: one is empty.
    """
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(string, str) for string in strings):
        raise TypeError(f"stop is {stop!r}, and a text or a list of texts is needed; to end at ids, use eos")
    if "" in strings:
        raise ValueError("stop holds an empty text, which would end every text at once; leave it out")
    return tuple(strings)
