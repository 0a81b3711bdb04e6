"""Tokens per second of greedy decoding after a prompt. Several models take turns in one run."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from any4_jax.benchmarks import profile
from any4_jax.benchmarks.contestants import Contestant, Entry, groups
from any4_jax.benchmarks.quantize import peak_gb
from any4_jax.benchmarks.timing import StreamingRead, significant


@dataclass(frozen=True)
class Decode:
    """What to measure.

    Attributes:
      contexts: tokens of the prompts; each is measured on its own.
      batches: numbers of rows, likewise, with each context.
      tokens: new tokens of a row, at least 2. The first one counts towards the prompt.
      rounds: turns of each contestant, at least 1. One more turn before these compiles, and is not counted.
      profiled: whether each contestant has one more turn under jax's profiler, on a GPU.

    Raises:
      ValueError: there is no context or no batch, or a number is too small.
    """

    contexts: tuple[int, ...] = (32,)
    batches: tuple[int, ...] = (1,)
    tokens: int = 128
    rounds: int = 5
    profiled: bool = False

    def __post_init__(self) -> None:
        wanted = [("contexts", min(self.contexts, default=0), 1), ("batches", min(self.batches, default=0), 1)]
        for name, value, least in (*wanted, ("tokens", self.tokens, 2), ("rounds", self.rounds, 1)):
            if value < least:
                raise ValueError(f"got {name}={getattr(self, name)}, need {least} or more; raise it")

    @property
    def cases(self) -> list[tuple[int, int]]:
        """(context, batch), in the order in which they are measured."""
        return [(context, batch) for batch in self.batches for context in self.contexts]


@dataclass
class Taken:
    """What a contestant took in one case: seconds to the first token, and from there to the last, of each turn.

    It outlives the contestant, whose memory the next group needs, and so doesn't refer to it.
    """

    facts: Mapping[str, Any]
    read_bytes: int
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    peak_gb: float = 0.0
    classes: dict[str, Any] = field(default_factory=dict)


def run(
    entries: Mapping[str, Entry],
    config: Decode,
    *,
    stream: StreamingRead,
    room: int | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """One row per case and contestant, with medians over rounds, and notes on what could not be measured.

    In each round every contestant has one turn, or every one of those that fit in memory together. The prompts are
    random, and the same for all. Who runs out of memory in a case has no row there.

    Args:
      entries: by name; speeds are compared with the first.
      config: what to measure.
      stream: measured before each round.
      room: bytes for weights; None means that all contestants fit.
      progress: called with (done, total, what is next).

    Raises:
      ValueError: a contestant's context is too short for a case. Nothing has been measured then.
      RuntimeError: a contestant stopped early.
    """
    needed = max(config.contexts) + config.tokens
    for name, entry in entries.items():
        if entry.context is not None and needed > entry.context:
            raise ValueError(
                f"{name} has a context of {entry.context} tokens, and {max(config.contexts)} of a prompt with "
                f"{config.tokens} new ones are {needed}; shorten the prompt or decode fewer"
            )
    held, notes = groups(entries, room)
    taken: dict[tuple[tuple[int, int], str], Taken] = {}
    turns = (config.rounds + 1) * len(config.cases) * sum(map(len, held))
    done = 0
    for group in held:
        contestants = {name: entries[name].create() for name in group}
        vocabulary = min(each.vocabulary for each in contestants.values())
        for case in config.cases:
            prompts = np.random.default_rng(0).integers(0, vocabulary, case[::-1])
            playing = {name: Taken(each.facts, each.read_bytes) for name, each in contestants.items()}
            for turn in range(config.rounds + 1):
                stream.measure()
                for place in range(len(group)):
                    name = group[(turn + place) % len(group)]
                    progress(done, turns, f"{name}, {case[0]} x {case[1]}")
                    done += 1
                    if name not in playing:
                        continue
                    last = turn == config.rounds
                    if not _turn(contestants[name], playing[name], prompts, config, last):
                        notes.append(f"{name} ran out of memory with {case[1]} prompts of {case[0]} tokens")
                        del playing[name]
            taken |= {(case, name): each for name, each in playing.items()}
        # Before the next group is made; what refers to itself is freed by the collector alone.
        del contestants
        gc.collect()
    first = next(iter(entries))
    rows = [
        _row(taken[case, name], case, config, stream, taken.get((case, first)))
        for case in config.cases
        for name in entries
        if (case, name) in taken
    ]
    return rows, notes


def _turn(contestant: Contestant, taken: Taken, prompts: np.ndarray, config: Decode, last: bool) -> bool:
    """Has a contestant decode once, or where it is the last time and so wanted, once more under the profiler. Returns
    whether the memory was enough."""
    try:
        prefill, decode = _timed(contestant.run(prompts, config.tokens), config.tokens)
        taken.prefill.append(prefill)
        taken.decode.append(decode)
        if last and config.profiled:
            wall_ms = 1e3 * float(np.median(taken.decode[1:]))
            taken.classes = profile.decoding(contestant.run(prompts, config.tokens), config.tokens - 1, wall_ms)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return False
    taken.peak_gb = peak_gb()
    return True


def _timed(chunks: Iterator[list[list[int]]], tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last."""
    begin = time.perf_counter()
    counts = [len(row) for row in next(chunks)]
    first = time.perf_counter()
    for chunk in chunks:
        counts = [count + len(row) for count, row in zip(counts, chunk, strict=True)]
    end = time.perf_counter()
    if min(counts) != tokens:
        raise RuntimeError(f"got {min(counts)} new tokens, need {tokens}; the engine stopped early, so it isn't timed")
    return first - begin, end - first


def _row(
    taken: Taken, case: tuple[int, int], config: Decode, stream: StreamingRead, first: Taken | None
) -> dict[str, Any]:
    context, batch = case
    steps = config.tokens - 1
    prefill, decode = (float(np.median(column[1:])) for column in (taken.prefill, taken.decode))
    rate = taken.read_bytes * steps / decode / 1e9
    return {
        **taken.facts,
        "prompt_tokens": context,
        "batch": batch,
        "prefill_ms": significant(1e3 * prefill),
        "second_prefill_ms": significant(1e3 * taken.prefill[1]),
        "prefill_compile_s": significant(max(taken.prefill[0] - prefill, 0.0)),
        "decode_compile_s": significant(max(taken.decode[0] - decode, 0.0)),
        "decode_tokens_per_s": significant(batch * steps / decode),
        "decode_tokens_per_s_of_a_row": significant(steps / decode),
        "best_decode_tokens_per_s": significant(batch * steps / min(taken.decode[1:])),
        "decode_ms_per_token": significant(1e3 * decode / steps),
        "speed_ratio_to_first": None if first is None else significant(float(np.median(first.decode[1:])) / decode),
        "read_mb_per_token": significant(taken.read_bytes / 1e6),
        "gb_per_s": significant(rate),
        "share_of_streaming_read": significant(rate / stream.gb_per_s),
        "peak_gb": taken.peak_gb,
        **taken.classes,
    }
