"""Microseconds of one product x W^T on an NVIDIA GPU, where launching a kernel takes as long as a small product.

So each product is timed twice: as a single call from Python, and as one of many in a compiled loop, whose launches XLA
captures in CUDA graphs. The loop is how jitted decoding runs the product, and is compared with the captured graphs of
peers.
Letters: N outputs, K inputs, M rows of x.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.benchmarks.gemm import Gemm, Measured
from any4_jax.benchmarks.peers import Torch
from any4_jax.benchmarks.shapes import random_leaf
from any4_jax.benchmarks.sums import random_outliers, random_planes
from any4_jax.benchmarks.timing import Candidate, StreamingRead, interleaved, significant, tree_bytes
from any4_jax.formats import ramp
from any4_jax.product import matmul
from any4_jax.product.backends.cuda import CUDA, is_one_launch, launcher
from any4_jax.product.backends.pallas import PALLAS
from any4_jax.weights import dequantize, take_rows

ROWS = (1, 2, 4, 8, 16, 32, 64, 512, 2048)
# Copies of a weight, each of which is in one product of the loop's body: enough of them that the body's other work is
# negligible, few enough that it compiles soon.
LEAST_COPIES, MOST_COPIES = 4, 128
# torch's int4 product is for decoding: with 2048 rows it takes 25 times as long as a dense one.
MOST_ROWS_OF_INT4 = 64
# The first of our products, in a graph that is captured without XLA, as torch's are: in XLA's graphs a product takes
# half a microsecond longer, or more. Its result isn't checked, because that of the same kernel called by XLA is.
ALONE = "4 bits in CUDA, a table a row, without XLA"
# The approximate duration of a candidate's turn.
TURN_S = 0.006
# The approximate duration of one trip of its loop. The body goes through the weights several times if they are few:
# between trips the GPU waits some 15 us for the host, as long as two small products take.
TRIP_S = 0.0005
# Captures every sequence of launches in a graph, whose kernels run one after the other even if they are independent:
# the loop measures one product, not how well several fill the GPU together.
CAPTURED = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,DYNAMIC_SLICE_FUSION",
    "xla_gpu_graph_min_graph_size": 1,
    "xla_gpu_command_buffer_scheduling_mode": "SERIALIZE",
}
# Relative to the norm of the exact result; the measured one is bfloat16.
TOLERANCE = 1e-2
CHECKED = 256


@dataclasses.dataclass(frozen=True)
class _Product:
    """One way to compute x W^T in JAX, and the copies of its weight. Products with weights of one kind share them."""

    name: str
    call: Callable[[jax.Array, Any], jax.Array]
    copies: Sequence[Any]


def run(config: Gemm, progress: Callable[[int, int, str], None] = lambda done, total, what: None) -> Measured:
    """Measures every shape with every m, for bfloat16 x: few-bit weights, dense ones in XLA, and torch if installed.

    Args:
      config: what to measure.
      progress: called with (done, total, what is next).

    Raises:
      RuntimeError: the CUDA kernels can't compute the product, or their result is wrong.
    """
    stream = StreamingRead("cuda")
    rows: list[dict[str, Any]] = []
    notes: dict[str, None] = {}
    torch = None
    try:
        torch = Torch()
    except RuntimeError as error:
        notes.setdefault(str(error))
    for done, (n, k) in enumerate(config.shapes):
        progress(done, len(config.shapes), f"{n} x {k}")
        stream.measure()
        theirs = _theirs(torch, config, n, k, notes) if torch else {}
        rows += _rows(config, n, k, _ours(config, n, k), theirs)
    stream.measure()
    for row in rows:
        row["share_of_streaming_read"] = significant(row["gb_per_s"] / stream.gb_per_s)
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("shapes", "m")}
    loop = " ".join(f"--{name}={value}" for name, value in CAPTURED.items())
    return Measured(rows, {**settings, "loops_compiled_with": loop, **stream.settings()}, list(notes))


def _number(config: Gemm, size: int) -> int:
    return max(LEAST_COPIES, min(MOST_COPIES, -(-config.rotate_mb * 10**6 // size)))


def _ours(config: Gemm, n: int, k: int) -> dict[tuple[str, int], tuple[float, float, int]]:
    """(product, m) -> seconds in a loop, seconds of a call, and bytes of the weight."""
    few = _number(config, n * k * config.bits // 8)
    leaf = functools.partial(random_leaf, n=n, k=k, bits=config.bits, group_size=config.group_size)
    one_table: dict[str, Any] = {"levels": ramp(config.bits), "offsets": False}
    own, shared = ([leaf(seed, **kind) for seed in range(few)] for kind in ({}, one_table))
    rows = jax.ShapeDtypeStruct((1, k), jnp.bfloat16)
    reason = CUDA.supports(rows, own[0], "cuda")
    if reason is not None:
        raise RuntimeError(
            f"the CUDA kernels can't compute {n} x {k}: {reason}; omit --platform cuda to measure other backends"
        )
    in_cuda, in_pallas = (functools.partial(matmul, backend=backend.name) for backend in (CUDA, PALLAS))
    dense = [jax.random.normal(jax.random.key(i), (n, k), jnp.bfloat16) for i in range(_number(config, 2 * n * k))]
    products = [
        _Product(f"{config.bits} bits in CUDA, a table a row", in_cuda, own),
        _Product(f"{config.bits} bits in CUDA, one table", in_cuda, shared),
        _Product("bfloat16 in XLA", _dense, dense),
    ]
    if PALLAS.supports(rows, own[0], "cuda") is None:
        products.insert(2, _Product(f"{config.bits} bits in Pallas, a table a row", in_pallas, own))
    if config.binary:
        planes = [random_planes(seed, n, k, config.bits, config.group_size) for seed in range(few)]
        products.append(_Product(f"{config.bits} bits in CUDA, binary planes", matmul, planes))
    if config.outliers:
        spqr = [random_outliers(seed, n, k) for seed in range(_number(config, n * k * 4 // 8))]
        products.append(_Product("3 bits in CUDA, coded scales, outliers", matmul, spqr))
    inputs = {m: jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16) for m in config.m}
    jobs = [(product, m) for m in config.m for product in products]
    # XLA compiles these programs in parallel, except that it autotunes its own kernels for one program at a time.
    with ThreadPoolExecutor(8) as pool:
        programs = list(pool.map(lambda job: _compiled(job[0], inputs[job[1]]), jobs))
    taken = {}
    for (product, m), (once, loop, products_of_loop) in zip(jobs, programs, strict=True):
        x = inputs[m]
        _check(product, x, once(x, product.copies[0]))
        call = interleaved([Candidate(functools.partial(once, x), product.copies)], 5, overlap=True)
        turns = [_seconds(loop, x, product.copies) / products_of_loop for _ in range(config.rounds + 2)]
        # XLA captures the graphs in the first two turns.
        figures = float(np.median(turns[2:])), float(np.median(call)), tree_bytes(product.copies[0])
        taken[product.name, m] = figures
    return taken


def _seconds(program: Callable[..., jax.Array], *arguments: Any) -> float:
    begin = time.perf_counter()
    program(*arguments).block_until_ready()
    return time.perf_counter() - begin


def _dense(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))


def _compiled(product: _Product, x: jax.Array) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array], int]:
    """The compiled product, a compiled loop of it over all weights, and how many products the loop computes."""
    copies = product.copies
    n, k = copies[0].shape
    guess = max(tree_bytes(copies[0]) / 2.5e12, 2 * x.shape[0] * n * k / 5e14) + 2e-6
    times = max(2, round(TURN_S / guess / len(copies)))
    passes = min(times, math.ceil(TRIP_S / guess / len(copies)))
    times = -(-times // passes) * passes

    def body(_: jax.Array, x: jax.Array, weights: Sequence[Any]) -> jax.Array:
        ys = [product.call(x, w) for w in weights]
        # So that every product is used, and differs from that of the trip before.
        return x.at[0, 0].set(sum(y[0, 0] for y in ys) / len(ys))

    @functools.partial(jax.jit, compiler_options=CAPTURED)
    def loop(x: jax.Array, weights: Sequence[Any]) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda i, x: body(i, x, weights), x, unroll=passes)

    once = jax.jit(product.call).lower(x, copies[0]).compile()
    return once, loop.lower(x, product.copies).compile(), times * len(copies)


def _check(product: _Product, x: jax.Array, y: jax.Array) -> None:
    """Compares some rows and outputs with float64.

    Raises:
      RuntimeError: they differ by more than rounding does.
    """
    w = product.copies[0]
    n = w.shape[0]
    some = np.r_[0 : min(CHECKED, n), max(0, n - CHECKED) : n]
    part = w[some] if isinstance(w, jax.Array) else take_rows(w, jnp.asarray(some))
    rows = np.r_[0, -1]
    right = np.asarray(x[rows], np.float64) @ np.asarray(dequantize(part), np.float64).T
    error = np.linalg.norm(np.asarray(y[rows][:, some], np.float64) - right) / np.linalg.norm(right)
    if not error <= TOLERANCE:
        raise RuntimeError(
            f"{product.name}, {x.shape[0]} rows: the relative error of the result is {error:.1e}, and rounding "
            f"explains at most {TOLERANCE:.0e}; the kernel is wrong, so it isn't timed"
        )


def _theirs(
    torch: Torch, config: Gemm, n: int, k: int, notes: dict[str, None]
) -> dict[tuple[str, int], tuple[float, int]]:
    """(product, m) -> seconds in a captured graph, and bytes of the weight."""
    dense, few = 2 * n * k, n * k // 2 + 4 * n * (k // config.group_size)
    taken: dict[tuple[str, int], tuple[float, int]] = {}
    try:
        seconds = torch.cublas(n, k, config.m, _number(config, dense), config.rounds)
        taken |= {("bfloat16 by cuBLAS", m): (s, dense) for m, s in zip(config.m, seconds, strict=True)}
        if config.bits == 4 and k % 128 == 0 and n % 8 == 0 and config.group_size in (32, 64, 128, 256):
            rows = tuple(m for m in config.m if m <= MOST_ROWS_OF_INT4)
            seconds = torch.int4(n, k, rows, _number(config, few), config.rounds, config.group_size)
            taken |= {("int4 by torch", m): (s, few) for m, s in zip(rows, seconds, strict=True)}
        if config.bits == 4:
            rows = tuple(m for m in config.m if is_one_launch(m))
            seconds = torch.few_bits(launcher(), n, k, rows, _number(config, few), config.rounds, config.group_size)
            taken |= {(ALONE, m): (s, few + 32 * n) for m, s in zip(rows, seconds, strict=True)}
    except torch.out_of_memory():
        notes.setdefault(f"{n} x {k}: jax left torch too little memory; set XLA_PYTHON_CLIENT_PREALLOCATE=false")
    return taken


def _rows(config: Gemm, n: int, k: int, ours: dict, theirs: dict) -> list[dict[str, Any]]:
    """The rows of one shape; the share of the streaming read is filled in later."""
    rows = []
    for m in config.m:
        cublas, _ = theirs.get(("bfloat16 by cuBLAS", m), (None, 0))
        taken = [(name, *figures) for (name, rows), figures in ours.items() if rows == m]
        taken += [(name, us, None, size) for (name, rows), (us, size) in theirs.items() if rows == m]
        xla = ours["bfloat16 in XLA", m][0]
        for name, seconds, call, size in taken:
            rows.append(
                {
                    "n": n,
                    "k": k,
                    "m": m,
                    "product": name,
                    "us": significant(1e6 * seconds),
                    "call_us": None if call is None else significant(1e6 * call),
                    "speed_ratio_to_cublas": None if cublas is None else significant(cublas / seconds),
                    "speed_ratio_to_xla": significant(xla / seconds),
                    "gb_per_s": significant((size + 2 * m * k) / seconds / 1e9),
                    "share_of_streaming_read": None,
                }
            )
    return rows
