"""Timing that a shared machine disturbs little: candidates take turns, weights are cold, and a streaming read is
measured alongside."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.benchmarks.machine import cores

# The duration of a turn: long compared with the clock's resolution, and with refilling caches after a switch.
TURN_S = 0.02
# Larger than any last-level cache. A GPU needs more: it reads 512 MiB in less time than it takes to launch and wait.
STREAM_BYTES = {"cpu": 2**29}
STREAM_BYTES_ELSEWHERE = 2**32


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One of several programs that are compared.

    Attributes:
      call: the compiled program, a function of one of `copies`.
      copies: equal weights in different memory; successive calls take successive copies.
    """

    call: Callable[[Any], jax.Array]
    copies: Sequence[Any]


def interleaved(candidates: Sequence[Candidate], rounds: int, overlap: bool) -> np.ndarray:
    """Seconds per call of each candidate in each round, float64 [candidates, rounds].

    In each round every candidate has one turn, so that other load on the machine affects all of them; a different
    candidate begins each round.

    Args:
      candidates: what to time; they have been called before.
      rounds: at least 1.
      overlap: whether to wait only at the end of a turn, instead of after each call. True suits a device that works in
        order (a GPU); a CPU would run several calls at once.
    """
    calls = [_calls(candidate, overlap) for candidate in candidates]
    seconds = np.zeros((len(candidates), rounds))
    for turn in range(rounds):
        for place in range(len(candidates)):
            i = (turn + place) % len(candidates)
            seconds[i, turn] = _turn(candidates[i], turn * calls[i], calls[i], overlap) / calls[i]
    return seconds


def _calls(candidate: Candidate, overlap: bool) -> int:
    """How many calls make up a turn."""
    once = min(_turn(candidate, first, 1, overlap) for first in range(3))
    return max(1, min(len(candidate.copies), round(TURN_S / once)))


def _turn(candidate: Candidate, first: int, calls: int, overlap: bool) -> float:
    copies = candidate.copies
    begin = time.perf_counter()
    for number in range(first, first + calls):
        y = candidate.call(copies[number % len(copies)])
        if not overlap:
            y.block_until_ready()
    y.block_until_ready()
    return time.perf_counter() - begin


class StreamingRead:
    """The rate at which the device reads memory sequentially: an upper bound for products with cold weights.

    Attributes:
      gb_per_s: the best rate so far over all ways and repeats, in units of 10**9 bytes per second.
      way: how the best rate was measured, in words.
    """

    def __init__(self, platform: str) -> None:
        self._bytes = STREAM_BYTES.get(platform, STREAM_BYTES_ELSEWHERE)
        array = jnp.ones(self._bytes // 4, jnp.float32)
        total = jax.jit(jnp.sum)
        self._ways: dict[str, Callable[[], Any]] = {"jnp.sum": lambda: total(array).block_until_ready()}
        if platform == "cpu":
            threads = cores()
            pool, parts = ThreadPoolExecutor(threads), np.array_split(np.asarray(array), threads)
            self._ways[f"numpy.max in {threads} threads"] = lambda: list(pool.map(np.max, parts))
        self.gb_per_s, self.way = 0.0, ""
        for read in self._ways.values():
            read()

    def measure(self, repeats: int = 3) -> None:
        """Reads again, and keeps the best rate. Call it between other measurements, to see the machine as they do."""
        for name, read in list(self._ways.items()) * repeats:
            begin = time.perf_counter()
            read()
            rate = self._bytes / (time.perf_counter() - begin) / 1e9
            if rate > self.gb_per_s:
                self.gb_per_s, self.way = rate, f"{name} of {self._bytes / 1e6:.0f} MB"

    def settings(self) -> dict[str, str | float]:
        """The rate and the way, for the settings of a result."""
        return {"stream_gb_per_s": significant(self.gb_per_s), "stream_way": self.way}


def tree_bytes(tree: Any) -> int:
    """The bytes of a tree's arrays."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def significant(value: float) -> float:
    """Rounds to four significant digits; more would be noise."""
    return float(f"{value:.4g}")
