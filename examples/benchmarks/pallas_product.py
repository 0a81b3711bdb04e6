"""Microseconds of x W^T on an NVIDIA GPU: 4 bits in the Pallas kernels, and in the CUDA kernels if they are built;
dense bfloat16 in XLA, and in cuBLAS if torch is installed.

    XLA_FLAGS=--xla_gpu_enable_command_buffer= python examples/benchmarks/pallas_product.py --out products.json

`us` is the time per product of a program that computes one product after another. Each waits for the one before it, and
has its own weight: 400 MB of weights in total, so that no cache holds one. Without command buffers, as above, it
includes the launches. `device_us` is the time that the GPU works on all kernels of a product. cuBLAS runs in a captured
graph, which has no launches to wait for.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from any4_jax.benchmarks import machine, schema
from any4_jax.benchmarks.timing import StreamingRead, significant
from any4_jax.product import BACKENDS, explain, matmul
from any4_jax.weights import QuantizedTensor, dequantize

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192))
GROUP_SIZE = 128
ROTATE_BYTES = 400 * 10**6
TURNS = 15
WRONG = 1e-2


def weight(n: int, k: int, tables: str, seed: int) -> QuantizedTensor:
    """A weight [n, k] with random codes: any4's form, which has a table per row, or nf4's, with one table and no
    offsets."""
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


def in_xla(product: Callable[[jax.Array, Any], jax.Array], x: jax.Array, weights: list[Any]) -> tuple[float, float]:
    """Microseconds per product: by the clock (the median of TURNS turns), and on the device."""

    @jax.jit
    def program(x, weights):
        for w in weights:
            y = product(x, w)
            x = y if y.shape == x.shape else x + 0 * y[:, :1]
        return x

    jax.block_until_ready(program(x, weights))
    seconds = []
    for _ in range(TURNS):
        begin = time.perf_counter()
        # Waits once for three programs, so that the host's work is hidden behind the device's.
        jax.block_until_ready([program(x, weights) for _ in range(3)])
        seconds.append((time.perf_counter() - begin) / 3)
    _, kernels = profiler.measure(program, aggregate=False, iterations=3)(x, weights)
    milliseconds = np.median([sum(each for _, each in run) for run in kernels or [[]]])
    return 1e6 * float(np.median(seconds)) / len(weights), 1e3 * float(milliseconds) / len(weights)


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


def rows_of(n: int, k: int, counts: list[int], tables: list[str]) -> list[dict[str, Any]]:
    """The rows of one shape."""
    copies = {size: max(2, min(16, -(-ROTATE_BYTES // size))) for size in (n * k // 2, 2 * n * k)}
    few = {kind: [weight(n, k, kind, i) for i in range(copies[n * k // 2])] for kind in tables}
    dense = [jax.random.normal(jax.random.key(i), (n, k), jnp.bfloat16) * k**-0.5 for i in range(copies[2 * n * k])]
    exact = {kind: dequantize(weights[0]) for kind, weights in few.items()}
    rows = []
    for m in counts:
        x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
        cublas = by_cublas(n, k, m, copies[2 * n * k])
        times: dict[str, tuple[float, float | None]] = {"bfloat16 in XLA": in_xla(lambda x, w: x @ w.T, x, dense)}
        if cublas is not None:
            times["bfloat16 by cuBLAS"] = cublas, None
        for kind, weights in few.items():
            for backend in ("pallas", "cuda"):
                if BACKENDS.named(backend).supports(x, weights[0], "cuda") is not None:
                    continue
                product = lambda x, w, backend=backend: matmul(x, w, backend)  # noqa: E731
                right = jnp.matmul(x.astype(jnp.float32), exact[kind].T, precision=jax.lax.Precision.HIGHEST)
                error = jnp.linalg.norm(product(x, weights[0]).astype(jnp.float32) - right) / jnp.linalg.norm(right)
                if not error < WRONG:
                    raise RuntimeError(f"{backend}, {n} x {k}, m={m}: the result has a relative error of {error:.1e}")
                times[f"4 bits on {backend}, {'a table a row' if kind == 'rows' else 'one table'}"] = in_xla(
                    product, x, weights
                )
        for product, (us, device) in times.items():
            rows.append(
                {
                    "n": n,
                    "k": k,
                    "m": m,
                    "product": product,
                    "us": significant(us),
                    "device_us": None if device is None else significant(device),
                    "speed_ratio_to_xla": significant(times["bfloat16 in XLA"][0] / us),
                    "speed_ratio_to_cublas": significant(cublas / us) if cublas else None,
                }
            )
            on_device = "" if device is None else f" ({device:.1f} of the device)"
            print(f"{n:6} x {k:5}, m={m:4}: {us:8.1f} us{on_device}  {product}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--m", default="1,8,16,64,512", help="rows of x (default: 1,8,16,64,512)")
    parser.add_argument("--shapes", metavar="NxK,...", help="matrices [N, K] (default: those of models of 8B and 70B)")
    parser.add_argument("--tables", default="rows", help="rows, one, or rows,one (default: rows)")
    parser.add_argument("--out", required=True, metavar="FILE", help="write the results here as JSON")
    args = parser.parse_args()
    counts = [int(m) for m in args.m.split(",")]
    named_shapes = args.shapes.split(",") if args.shapes else []
    stream = StreamingRead(machine.platform())
    rows: list[dict[str, Any]] = []
    for n, k in [tuple(map(int, pair.split("x"))) for pair in named_shapes] or SHAPES:
        stream.measure()
        rows += rows_of(n, k, counts, args.tables.split(","))
    w = weight(8192, 8192, "rows", 0)
    notes = [explain(jax.ShapeDtypeStruct((1, 8192), jnp.bfloat16), w).replace("\n", "; ")]
    result = machine.result(
        "pallas_product",
        ["python", *sys.argv],
        settings={"group_size": GROUP_SIZE, "rotate_mb": ROTATE_BYTES // 10**6, "turns": TURNS, **stream.settings()},
        rows=rows,
        notes=notes,
        packages=["torch"],
    )
    schema.write(args.out, result)


if __name__ == "__main__":
    main()
