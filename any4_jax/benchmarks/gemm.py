"""Microseconds of one product x W^T: dense in XLA, and with a few-bit weight on every backend that can compute it.

Letters: N outputs, K inputs, M rows of x. Weights are random, because the time of a product doesn't depend on their
values. The result of every candidate is checked before it is timed.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax import packing
from any4_jax.benchmarks.machine import available_bytes, platform
from any4_jax.benchmarks.sums import planes_of, random_outliers
from any4_jax.benchmarks.timing import Candidate, StreamingRead, interleaved, significant, tree_bytes
from any4_jax.product import BACKENDS, matmul
from any4_jax.product.backends.base import Backend
from any4_jax.product.quantized_input import quantize_input
from any4_jax.weights import QuantizedTensor, QuantizeInput, dequantize, with_outliers

# [N, K] of the linears of a block. "-together" joins those with the same input into one matrix (q, k, v; o; gate, up;
# down), and adds the head.
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "smollm2-135m": ((576, 576), (192, 576), (1536, 576), (576, 1536)),
    "llama-3.2-1b": ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)),
    "llama-3.1-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "llama-3.2-1b-together": ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (128256, 2048)),
    "llama-3.1-8b-together": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
    "llama-3.1-70b-together": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672), (128256, 8192)),
    "squares": ((1024, 1024), (2048, 2048), (4096, 4096), (8192, 8192), (16384, 16384)),
}
DTYPES = ("float32", "bfloat16")
OUTLIERS = ", coded scales, outliers"
DENSE = ("dense x @ W[N, K].T", "dense x @ W[K, N]")
# Relative to the norm of the exact result: float32 sums of 10,000 terms stay below 1e-5, bfloat16 results below 1e-2.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
# With more copies of a small matrix than this, their handles take more memory than their values.
MOST_COPIES = 512
# The result is checked in float64, this many rows of W at a time.
CHECKED_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Gemm:
    """What to measure.

    Attributes:
      shapes: pairs of N and K.
      m: numbers of rows of x.
      bits, group_size: of the weight, which is in any4's form: a table for each row, bfloat16 scales and offsets.
      rounds: turns of each candidate.
      rounded: whether bytes are measured too: a weight of int8 tables, or of integers beyond 4 bits, whose inputs are
        rounded to int8, with a scale for each 32 and with one for each row.
      binary: whether a sum of as many binary planes is measured too, a BCQ's weight.
      outliers: whether SpQR's weight is measured too: 3 bits in groups of 16, and a hundredth of outliers.
      rotate_mb: total size, in units of 10**6 bytes, of the copies of its weight through which a candidate's calls
        rotate, so that weights come from memory and not from a cache.
    """

    shapes: tuple[tuple[int, int], ...]
    m: tuple[int, ...] = (1, 16)
    bits: int = 4
    group_size: int = 128
    rounds: int = 15
    rotate_mb: int = 400
    rounded: bool = False
    binary: bool = False
    outliers: bool = False


@dataclasses.dataclass(frozen=True)
class Measured:
    """The rows, settings and notes of a `Result`."""

    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class _Product:
    """One way to compute x W^T: a compiled function of x and one of `copies`, the W that each copy stands for, and what
    it makes of x."""

    name: str
    dtype: str
    run: Callable[[jax.Array, Any], jax.Array]
    copies: list[Any]
    exact: jax.Array
    seen: Callable[[jax.Array], jax.Array] = lambda x: x


def run(config: Gemm, progress: Callable[[int, int, str], None] = lambda done, total, what: None) -> Measured:
    """Measures every shape with every m.

    Args:
      config: what to measure.
      progress: called with (done, total, what is next).

    Raises:
      RuntimeError: the result of a candidate is wrong.
    """
    where = platform()
    stream = StreamingRead(where)
    rows: list[dict[str, Any]] = []
    notes: dict[str, None] = {}
    pairs = list(itertools.product(config.shapes, config.m))
    for done, ((n, k), m) in enumerate(pairs):
        progress(done, len(pairs), f"{n} x {k}, {m} rows")
        stream.measure()
        # No name is bound to the copies, so they are freed before those of the next shape are created.
        rows += _measured(
            _products(config, n, k, m, where, notes.setdefault), n, k, m, config.rounds, overlap=where != "cpu"
        )
    stream.measure()
    for row in rows:
        row["share_of_streaming_read"] = significant(row["gb_per_s"] / stream.gb_per_s)
    empty = Candidate(jax.jit(lambda x: x + 1), [jnp.zeros(1)] * MOST_COPIES)
    settings: dict[str, Any] = {
        **{name: value for name, value in dataclasses.asdict(config).items() if name not in ("shapes", "m")},
        "empty_call_us": significant(1e6 * float(np.median(interleaved([empty], 5, where != "cpu")[0]))),
        **stream.settings(),
    }
    return Measured(rows, settings, list(notes))


def _measured(products: list[_Product], n: int, k: int, m: int, rounds: int, overlap: bool) -> Iterator[dict[str, Any]]:
    """The rows of one shape and m; the share of the streaming read is filled in later."""
    x = np.random.default_rng(m).standard_normal((m, k), np.float32)
    inputs = {dtype: jnp.asarray(x, dtype) for dtype in DTYPES}
    errors = [_error(product, inputs[product.dtype]) for product in products]
    calls = [Candidate(functools.partial(p.run, inputs[p.dtype]), p.copies) for p in products]
    seconds = interleaved(calls, rounds, overlap)
    typical = [float(np.median(turns)) for turns in seconds]
    dense = min(t for t, p in zip(typical, products, strict=True) if p.name in DENSE and p.dtype == "float32")
    for product, error, turns, once in zip(products, errors, seconds, typical, strict=True):
        read = tree_bytes(product.copies[0]) + inputs[product.dtype].nbytes
        yield {
            "n": n,
            "k": k,
            "m": m,
            "product": product.name,
            "dtype": product.dtype,
            "us": significant(1e6 * once),
            "best_us": significant(1e6 * float(turns.min())),
            "speed_ratio_to_dense_float32": significant(dense / once),
            "read_mb": significant(read / 1e6),
            "gb_per_s": significant(read / once / 1e9),
            "share_of_streaming_read": None,
            "error_ratio": significant(error),
            "copies": len(product.copies),
        }


def _products(config: Gemm, n: int, k: int, m: int, where: str, note: Callable[[str], object]) -> list[_Product]:
    """All ways to compute one product here; `note` is called with a sentence for each thing that is left out."""
    w = jnp.asarray(np.random.default_rng(0).standard_normal((n, k), np.float32) * k**-0.5)
    q = random_weight(n, k, config.bits, config.group_size)
    weights: dict[str, Any] = {"": q}
    if config.rounded:
        weights[", int8 inputs"] = _rounding(q, "group")
        weights[", int8 inputs by token"] = _rounding(q, "token")
    if config.binary:
        weights[", binary planes"] = planes_of(q)
    if config.outliers:
        weights[OUTLIERS] = random_outliers(1, n, k)
    able: dict[tuple[str, str], list[str]] = {}
    for (label, weight), backend, dtype in itertools.product(weights.items(), BACKENDS.options, DTYPES):
        reason = _why_not(backend, jax.ShapeDtypeStruct((m, k), dtype), weight, where)
        if reason is None:
            able.setdefault((backend.name, label), []).append(dtype)
        else:
            note(f"no product on the backend {backend.name}{label}: {reason}")

    # Each of these has copies of its own: two layouts in two dtypes, and the quantized weight on each backend.
    rotate = config.rotate_mb * 10**6
    room = available_bytes()
    if room is not None and rotate * (4 + len(able)) > room // 2:
        rotate = room // 2 // (4 + len(able))
        note(f"{n} x {k}: copies take {rotate // 10**6} MB per candidate, half of the free memory for all of them")

    def copies(weight: Any) -> list[Any]:
        number = -(-rotate // tree_bytes(weight))
        if number > MOST_COPIES:
            total = MOST_COPIES * tree_bytes(weight) // 10**6
            note(f"{n} x {k}: {MOST_COPIES} copies of {tree_bytes(weight) / 1e6:.2f} MB make only {total} MB")
        return [_copy(weight) for _ in range(max(2, min(MOST_COPIES, number)))]

    products = []
    for dtype in DTYPES:
        exact = w.astype(dtype)
        products.append(_Product(DENSE[0], dtype, _dense_transposed, copies(exact), exact))
        products.append(_Product(DENSE[1], dtype, _dense, copies(exact.T), exact))
    for (name, label), dtypes in able.items():
        weight, dense = copies(weights[label]), dequantize(weights[label])
        rounded = isinstance(weights[label], QuantizeInput)
        seen = functools.partial(quantize_input, w=weights[label]) if rounded else _Product.seen
        run = jax.jit(functools.partial(matmul, backend=name))
        for dtype in dtypes:
            bits = f"{3 if label == OUTLIERS else config.bits} bits"
            products.append(_Product(f"{bits} on {name}{label}", dtype, run, weight, dense, seen))
    return products


def _why_not(backend: Backend, x: Any, weight: Any, where: str) -> str | None:
    """Why a backend can't compute the product, at once or term by term."""
    whole = backend.supports(x, weight, where)
    if whole is None or with_outliers(weight) is None:
        return whole
    return next((reason for term in weight.terms if (reason := backend.supports(x, term, where))), None)


def _rounding(q: QuantizedTensor, per: Literal["group", "token"]) -> QuantizeInput:
    """A weight of bytes with the shape and the size of values of `random_weight`'s, behind inputs of 8 bits."""
    step, ramp = (2**q.bits - 1) / 127, q.bits > 4
    table = jnp.arange(2.0**q.bits)[None] if ramp else jnp.round(q.lut.astype(jnp.float32) / step).astype(jnp.int8)
    scales = q.scales if ramp else (q.scales * step).astype(q.scales.dtype)
    return QuantizeInput(dataclasses.replace(q, lut=table, scales=scales, uniform=ramp), None, 8, True, per)


def random_weight(n: int, k: int, bits: int, group_size: int) -> QuantizedTensor:
    """A weight [N, K] in any4's form, with random codes and tables; its values are about 1 / sqrt(K)."""
    rng = np.random.default_rng(1)
    groups = -(-k // group_size)
    size = (15 / (2**bits - 1)) * k**-0.5
    return QuantizedTensor(
        codes=packing.pack(jnp.asarray(rng.integers(0, 2**bits, (n, k), np.uint8)), bits),
        lut=jnp.asarray(np.sort(rng.uniform(0, 2**bits - 1, (n, 2**bits))), jnp.bfloat16),
        scales=jnp.asarray(rng.uniform(0.1, 0.3, (n, groups)) * size, jnp.bfloat16),
        offsets=jnp.asarray(rng.uniform(-2.0, -1.0, (n, groups)) * k**-0.5, jnp.bfloat16),
        bits=bits,
        group_size=group_size,
        padding=packing.padding(k, bits),
        uniform=False,
    )


# HIGHEST, as in this library's models: by default a GPU would round float32 to 10 bits.
@jax.jit
def _dense_transposed(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.matmul(x, w.T, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _dense(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.matmul(x, w, precision=jax.lax.Precision.HIGHEST)


def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def _error(product: _Product, x: jax.Array) -> float:
    """The norm of the error over that of the exact result, which numpy computes in float64 from the product's inputs.

    Raises:
      RuntimeError: the error exceeds rounding.
    """
    wide = np.asarray(product.seen(x.astype(jnp.float32)), np.float64)
    exact = np.asarray(product.exact, np.float32)
    blocks = [wide @ exact[row : row + CHECKED_ROWS].astype(np.float64).T for row in range(0, len(exact), CHECKED_ROWS)]
    right = np.concatenate(blocks, axis=1)
    error = np.linalg.norm(np.asarray(product.run(x, product.copies[0]), np.float64) - right) / np.linalg.norm(right)
    limit = TOLERANCE[product.dtype]
    if not error <= limit:
        raise RuntimeError(
            f"{product.name}, {product.dtype}: the relative error of the result is {error:.1e}, and rounding explains "
            f"at most {limit:.0e}; the kernel is wrong, so it isn't timed"
        )
    return float(error)
