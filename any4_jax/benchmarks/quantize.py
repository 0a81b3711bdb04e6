"""Seconds to quantize linears with the shapes of a model's, by any method; weights are random and normal.

Statistics are of random inputs with what makes those of a model hard: channels of very different sizes that occur
together. Each input is independent noise plus 64 directions of falling strength, which hold most of its energy, times a
lognormal factor for each channel. There are at least 4096 tokens and at least as many as channels, so that a Hessian
has full rank. For statistics that compare them with the float model's inputs, these differ by noise of 5 percent.
"""

import dataclasses
import resource
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax import statistics
from any4_jax.benchmarks.gemm import SHAPES
from any4_jax.benchmarks.timing import significant
from any4_jax.methods import Method, quantize
from any4_jax.statistics import Gathered, Statistic

BLOCKS = {"smollm2-135m": 30, "llama-3.2-1b": 16, "llama-3.1-8b": 32}
"""How many blocks each model has."""
PER_BLOCK = (2, 2, 2, 1)
"""How many linears of a block have each of the model's `gemm.SHAPES`: q and o, k and v, gate and up, down."""

TOKENS, DIRECTIONS = 4096, 64


@dataclasses.dataclass(frozen=True)
class Quantize:
    """What to measure.

    Attributes:
      model: a key of `BLOCKS`.
      method: any method of one matrix; it gets the statistics of `random_statistics`.
      matrices: the most matrices of each shape to quantize; the others are assumed to take as long. None means all.
    """

    model: str
    method: Method
    matrices: int | None = None


def run(
    config: Quantize, progress: Callable[[int, int, str], None] = lambda done, total, what: None
) -> list[dict[str, Any]]:
    """One row per shape.

    Before the timed matrices of a shape, one more is quantized to compile; `compile_s` is the time that this adds. Each
    matrix is created on the device right before its turn. Creating it isn't timed, nor are the statistics, which the
    matrices of a shape share.

    Args:
      config: what to measure.
      progress: called with (rows of weights done, rows in total, what is next).

    Raises:
      ValueError: there is no such model, or `matrices` is below 1.
    """
    if config.model not in BLOCKS:
        raise ValueError(f"got model={config.model!r}, need one of {', '.join(BLOCKS)}; choose one of these")
    if config.matrices is not None and config.matrices < 1:
        raise ValueError(f"got matrices={config.matrices}, need 1 or more; pass None for all")
    counts = [BLOCKS[config.model] * times for times in PER_BLOCK]
    measured = [min(count, config.matrices or count) for count in counts]
    shapes = SHAPES[config.model]
    total, done = sum(n * number for (n, _), number in zip(shapes, measured, strict=True)), 0
    rows = []
    for (n, k), count, number in zip(shapes, counts, measured, strict=True):
        key = jax.random.key(n + k)
        wanted = (*statistics.DEFAULT, *config.method.needs)
        stats = jax.block_until_ready(random_statistics(key, k, wanted))
        seconds = []
        for turn in range(number + 1):
            progress(done, total, f"{n} x {k}")
            w = jax.block_until_ready(jax.random.normal(jax.random.fold_in(key, turn), (n, k), jnp.float32))
            begin = time.perf_counter()
            jax.block_until_ready(quantize(w, config.method, stats))
            seconds.append(time.perf_counter() - begin)
            done += n if turn else 0
        each = float(np.median(seconds[1:]))
        rows.append(
            {
                "n": n,
                "k": k,
                "matrices": count,
                "measured": number,
                "compile_s": significant(max(seconds[0] - each, 0.0)),
                "seconds_per_matrix": significant(each),
                "rows_per_s": significant(n / each),
                "seconds_in_all": significant(sum(seconds[1:]) / number * count + max(seconds[0] - each, 0.0)),
            }
        )
    return rows


def random_statistics(key: jax.Array, k: int, wanted: Iterable[Statistic]) -> Gathered:
    """Statistics of random inputs of K channels, of which the module's docstring tells."""
    of_channels, of_tokens = jax.random.split(key)
    gathered = statistics.empty(k, dict.fromkeys(wanted))
    for number in range(-(-k // TOKENS)):
        gathered = _more_tokens(of_channels, jax.random.fold_in(of_tokens, number), gathered)
    return gathered


@jax.jit
def _more_tokens(of_channels: jax.Array, of_tokens: jax.Array, gathered: Gathered) -> Gathered:
    k = gathered.k
    sizes, directions = jax.random.split(of_channels)
    size = jnp.exp(jax.random.normal(sizes, (k,)))
    shared = jax.random.normal(directions, (DIRECTIONS, k))
    strength, own, error = jax.random.split(of_tokens, 3)
    falling = 2 / jnp.sqrt(1 + jnp.arange(DIRECTIONS, dtype=jnp.float32))
    together = (jax.random.normal(strength, (TOKENS, DIRECTIONS)) * falling) @ shared
    x = (jax.random.normal(own, (TOKENS, k)) + together) * size
    x_float = x + 0.05 * size * jax.random.normal(error, (TOKENS, k))
    return statistics.update(gathered, x, x_float=x_float)


def peak_gb() -> float:
    """The peak memory of this process in units of 10**9 bytes: of the device, or of the host on a CPU."""
    stats = jax.devices()[0].memory_stats() or {}
    held = stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return significant(held / 1e9)
