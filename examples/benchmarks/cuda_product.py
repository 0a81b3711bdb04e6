"""Microseconds of x W^T on an NVIDIA GPU: 4 bits in the CUDA kernels beside dense bfloat16, in XLA and by cuBLAS.

    XLA_FLAGS=--xla_gpu_enable_command_buffer= python examples/benchmarks/cuda_product.py --out products.json

Each figure is of many products in a row, each with a weight of its own: 400 MB of them, so that no cache holds any.
In XLA they are one program, and the flag above keeps it from running several at once. cuBLAS is called through torch,
where that is installed, in a captured graph.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax import matmul
from any4_jax.benchmarks import machine, schema
from any4_jax.benchmarks.timing import StreamingRead, significant, tree_bytes
from any4_jax.weights import QuantizedTensor

SHAPES = ((4096, 4096), (6144, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (8192, 28672))
GROUP_SIZE = 128
ROTATE_BYTES = 400 * 10**6
TURNS = 15


def weight(n: int, k: int, tables: str, seed: int) -> QuantizedTensor:
    """A weight [n, k] of random codes: any4's form with a table a row, nf4's with one table and no offsets."""
    keys = jax.random.split(jax.random.key(seed), 4)
    groups = -(-k // GROUP_SIZE)
    return QuantizedTensor(
        codes=jax.random.bits(keys[0], (n, k // 2), jnp.uint8),
        lut=jnp.sort(jax.random.normal(keys[1], (n if tables == "rows" else 1, 16), jnp.bfloat16)),
        scales=jax.random.uniform(keys[2], (n, groups), jnp.bfloat16, 0.5, 1.5) * k**-0.5,
        offsets=jax.random.normal(keys[3], (n, groups), jnp.bfloat16) * k**-0.5 if tables == "rows" else None,
        bits=4,
        group_size=GROUP_SIZE,
        padding=0,
        uniform=False,
    )


def in_xla(product: Callable[[jax.Array, Any], jax.Array], x: jax.Array, weights: list[Any]) -> float:
    """Microseconds of a product, the median of TURNS turns through all weights."""
    program = jax.jit(lambda x, weights: [product(x, w) for w in weights])
    jax.block_until_ready(program(x, weights))
    seconds = []
    for _ in range(TURNS):
        begin = time.perf_counter()
        # Waiting once for three, so that the host's share is hidden behind the device's.
        jax.block_until_ready([program(x, weights) for _ in range(3)])
        seconds.append((time.perf_counter() - begin) / 3 / len(weights))
    return 1e6 * float(np.median(seconds))


def by_cublas(n: int, k: int, m: int, copies: int) -> float | None:
    """Microseconds of torch's dense product, or None without torch."""
    try:
        import torch
    except ImportError:
        return None
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    torch.nn.functional.linear(x, weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for w in weights:
            torch.nn.functional.linear(x, w)
    times = []
    for _ in range(TURNS + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / copies)
    del weights, graph
    torch.cuda.empty_cache()
    return float(np.median(times[3:]))


def rows_of(n: int, k: int, counts: list[int]) -> list[dict[str, Any]]:
    """The rows of one shape."""
    copies = {size: max(2, min(64, -(-ROTATE_BYTES // size))) for size in (n * k // 2, 2 * n * k)}
    few = {tables: [weight(n, k, tables, i) for i in range(copies[n * k // 2])] for tables in ("rows", "one")}
    dense = [jax.random.normal(jax.random.key(i), (n, k), jnp.bfloat16) for i in range(copies[2 * n * k])]
    rows = []
    for m in counts:
        x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
        times: dict[str, tuple[float | None, int]] = {
            "4 bits, a table a row": (in_xla(matmul, x, few["rows"]), tree_bytes(few["rows"][0])),
            "4 bits, one table": (in_xla(matmul, x, few["one"]), tree_bytes(few["one"][0])),
            "bfloat16 in XLA": (in_xla(lambda x, w: x @ w.T, x, dense), 2 * n * k),
            "bfloat16 by cuBLAS": (by_cublas(n, k, m, copies[2 * n * k]), 2 * n * k),
        }
        cublas = times["bfloat16 by cuBLAS"][0]
        for product, (us, read) in times.items():
            if us is None:
                continue
            rows.append(
                {
                    "n": n,
                    "k": k,
                    "m": m,
                    "product": product,
                    "us": significant(us),
                    "speed_ratio_to_cublas": significant(cublas / us) if cublas else None,
                    "gb_per_s": significant(read / us / 1e3),
                }
            )
            print(f"{n:6} x {k:5}, m={m:4}: {us:8.1f} us  {product}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--m", default="1,8", help="rows of x (default: 1,8)")
    parser.add_argument(
        "--shapes", metavar="NxK,...", help="matrices [N, K] (default: those of the models of 8B to 70B)"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="write the results here as JSON")
    args = parser.parse_args()
    stream = StreamingRead(machine.platform())
    rows = []
    named = args.shapes.split(",") if args.shapes else []
    for n, k in [tuple(map(int, pair.split("x"))) for pair in named] or SHAPES:
        stream.measure()
        rows += rows_of(n, k, [int(m) for m in args.m.split(",")])
    result = machine.result(
        "cuda_product",
        ["python", *sys.argv],
        settings={"group_size": GROUP_SIZE, "rotate_mb": ROTATE_BYTES // 10**6, "turns": TURNS, **stream.settings()},
        rows=rows,
        packages=["torch"],
    )
    schema.write(args.out, result)


if __name__ == "__main__":
    main()
