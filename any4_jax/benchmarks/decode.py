"""Tokens per second of greedy decoding of one row after a prompt. Several models take turns in one run."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from any4_jax.benchmarks.timing import StreamingRead, significant, tree_bytes
from any4_jax.generate import generate_tokens
from any4_jax.models.base import Decoder
from any4_jax.nn.nnx import Any4Embed


@dataclass(frozen=True)
class Contestant:
    """A model on an engine.

    Attributes:
      run: (prompt, number of new tokens) -> the new tokens, in chunks as they are decoded; the first chunk is the one
        token that follows the prompt.
      read_bytes: bytes of weights that each token reads.
      vocabulary: token ids are below this.
      facts: columns of its row: the model, the method, ...
    """

    run: Callable[[np.ndarray, int], Iterator[list[int]]]
    read_bytes: int
    vocabulary: int
    facts: Mapping[str, Any]


def contestant(name: str, model: Decoder) -> Contestant:
    """A model of this library, decoded by the loop of `generate`; its row shows the last part of its path."""

    def chunks(prompt: np.ndarray, tokens: int) -> Iterator[list[int]]:
        # eos=(): an end-of-text token doesn't stop the loop, so that all contestants decode equally many tokens.
        return (chunk[0] for chunk in generate_tokens(model, [prompt], max_new_tokens=tokens, eos=()))

    linears = () if model.recipe is None else model.recipe.linears
    methods = sorted({method.name for _, method, _ in linears})
    facts = {"model": Path(name).name, "method": " and ".join(methods) or "float", "dtype": model.dtype.name}
    return Contestant(chunks, read_bytes(model), model.config.vocab_size, facts)


def read_bytes(model: Decoder) -> int:
    """Bytes of weights that a token reads: all weights except embeddings that don't serve as the head, of which it
    reads one row."""
    looked_up = [
        node
        for path, node in nnx.iter_modules(model)
        if isinstance(node, nnx.Embed | Any4Embed) and ".".join(map(str, path)) not in model.head_site.linears
    ]
    return tree_bytes(nnx.state(model)) - sum(tree_bytes(nnx.state(embedding)) for embedding in looked_up)


def run(
    contestants: Mapping[str, Contestant],
    *,
    prompt_tokens: int,
    tokens: int,
    rounds: int,
    stream: StreamingRead,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[dict[str, Any]]:
    """One row per contestant, with medians over rounds; in each round every contestant has one turn.

    The prompt is random, and the same for all. The first new token counts towards the prompt, so `tokens` - 1 tokens
    are decoded.

    Args:
      contestants: by name; speeds are compared with the first.
      prompt_tokens: tokens of the prompt, at least 1.
      tokens: new tokens, at least 2.
      rounds: at least 1; one more round before these compiles, and is not counted.
      stream: measured before each round.
      progress: called with (done, total, what is next).

    Raises:
      ValueError: a number is too small, or a model's context is too short.
      RuntimeError: a contestant stopped early.
    """
    for name, value, least in (("prompt_tokens", prompt_tokens, 1), ("tokens", tokens, 2), ("rounds", rounds, 1)):
        if value < least:
            raise ValueError(f"got {name}={value}, need {least} or more; raise it")
    vocabulary = min(each.vocabulary for each in contestants.values())
    prompt = np.random.default_rng(0).integers(0, vocabulary, prompt_tokens)
    names, turns = list(contestants), (rounds + 1) * len(contestants)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(turns):
        turn, place = divmod(number, len(names))
        if place == 0:
            stream.measure()
        name = names[(turn + place) % len(names)]
        progress(number, turns, name)
        taken = _timed(contestants[name].run(prompt, tokens), tokens)
        if turn > 0:
            seconds[name].append(taken)

    first = float(np.median([decode for _, decode in seconds[names[0]]]))
    rows = []
    for name, each in contestants.items():
        prefill, decode = (float(np.median(column)) for column in zip(*seconds[name], strict=True))
        rate = each.read_bytes * (tokens - 1) / decode / 1e9
        rows.append(
            {
                **each.facts,
                "prefill_ms": significant(1e3 * prefill),
                "decode_tokens_per_s": significant((tokens - 1) / decode),
                "best_decode_tokens_per_s": significant((tokens - 1) / min(d for _, d in seconds[name])),
                "decode_ms_per_token": significant(1e3 * decode / (tokens - 1)),
                "speed_ratio_to_first": significant(first / decode),
                "read_mb_per_token": significant(each.read_bytes / 1e6),
                "gb_per_s": significant(rate),
                "share_of_streaming_read": significant(rate / stream.gb_per_s),
            }
        )
    return rows


def _timed(chunks: Iterator[list[int]], tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last."""
    begin = time.perf_counter()
    count = len(next(chunks))
    first = time.perf_counter()
    count += sum(map(len, chunks))
    end = time.perf_counter()
    if count != tokens:
        raise RuntimeError(f"got {count} new tokens, need {tokens}; the engine stopped early, so it isn't timed")
    return first - begin, end - first
