"""Finds the fastest configuration of a Pallas kernel for a product, by timing every promising one."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.benchmarks.gemm import random_weight
from any4_jax.benchmarks.timing import significant, tree_bytes
from any4_jax.choice import default_platform
from any4_jax.product import matmul
from any4_jax.product.backends import pallas
from any4_jax.weights import QuantizedTensor

# The copies of a weight together exceed every cache that a GPU has (an H100: 50 MB).
ROTATE_BYTES = 2 * 10**8
TURNS = 5


def run(
    shapes: tuple[tuple[int, int], ...], counts: tuple[int, ...], bits: int, group_size: int
) -> Iterator[dict[str, Any]]:
    """The fastest configuration for each shape and number of rows of a bfloat16 x, as rows of tuned.json.

    A row also has the microseconds of this configuration (`us`) and of the one that the rule gives (`rule_us`). A
    configuration that doesn't compile or fit is skipped; one that computes a wrong result is an error.

    Args:
      shapes: pairs of N and K.
      counts: numbers of rows of x.
      bits, group_size: of the weight.

    Raises:
      RuntimeError: the backend can't compute the product here, or a result is wrong.
    """
    for n, k in shapes:
        w = random_weight(n, k, bits, group_size)
        reason = pallas.PALLAS.supports(jax.ShapeDtypeStruct((1, k), jnp.bfloat16), w, default_platform())
        if reason is not None:
            raise RuntimeError(f"there is nothing to tune for {n} x {k}: {reason}")
        copies = [jax.tree.map(jnp.array, w) for _ in range(max(2, min(64, ROTATE_BYTES // tree_bytes(w))))]
        for m in counts:
            x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
            truth = np.asarray(matmul(x, w, "xla"), np.float32)
            alternatives = pallas.alternatives(x, w)
            with ThreadPoolExecutor(8) as pool:
                programs = list(pool.map(lambda pair: _compiled(pair[1], x, copies), alternatives))  # noqa: B023
            timed = []
            for (row, _), program in zip(alternatives, programs, strict=True):
                if program is None:
                    continue
                error = np.linalg.norm(np.asarray(program(x, copies)[1], np.float32) - truth) / np.linalg.norm(truth)
                if not error < 1e-2:
                    raise RuntimeError(f"{row['kernel']} with {row['config']} has a relative error of {error:.1e}")
                timed.append((_seconds(program, x, copies), row))
            seconds, best = min(timed, key=lambda pair: pair[0])
            yield {**best, "us": significant(1e6 * seconds), "rule_us": significant(1e6 * timed[0][0])}


_Program = Callable[[jax.Array, list[QuantizedTensor]], tuple[jax.Array, jax.Array]]


def _compiled(
    product: Callable[[jax.Array, QuantizedTensor], jax.Array], x: jax.Array, copies: list[QuantizedTensor]
) -> _Program | None:
    """A program that computes one product with each copy, one after the other, and also returns the first product; None
    if it doesn't compile."""

    @jax.jit
    def program(x, copies):
        products = []
        for w in copies:
            products.append(product(x, w))
            # Each product depends on the one before; otherwise XLA would run several at once.
            x = x + 0 * products[-1][:, :1]
        return x, products[0]

    try:
        return program.lower(x, copies).compile()
    except (jax.errors.JaxRuntimeError, ValueError):
        return None


def _seconds(program: _Program, x: jax.Array, copies: list[QuantizedTensor]) -> float:
    """Seconds per product of a program that has run before."""
    turns = []
    for _ in range(TURNS):
        begin = time.perf_counter()
        jax.block_until_ready(program(x, copies))
        turns.append(time.perf_counter() - begin)
    return float(np.median(turns)) / len(copies)
