"""What a product of codes has to get right on a GPU: one table of cases, and the laws that no table holds, for every
kernel family. A family brings its `product` and its `check`, which knows where it rounds."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from float64 import Terms

from any4_jax import weights
from any4_jax.partition import combine, partition
from any4_jax.product import matmul
from any4_jax.weights import QuantizedTensor

ULP = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
HALVES = list(ULP)

Product = Callable[[jax.Array, QuantizedTensor], jax.Array]
Check = Callable[[jax.Array, jax.Array, QuantizedTensor], None]


def leaf(
    n: int,
    k: int,
    *,
    bits: int = 4,
    g: int = 128,
    lut: Any = jnp.bfloat16,
    scale: Any = jnp.bfloat16,
    row_tables: bool = True,
    offsets: bool = True,
    seed: int = 0,
) -> QuantizedTensor:
    """Random codes, tables and scales; 8 bits get a ramp."""
    rng = np.random.default_rng(seed)
    shape = (n, -(-k // g))
    rows = n if row_tables else 1
    table = rng.normal(size=(rows, 2**bits))
    if bits == 8:
        table = np.broadcast_to(np.arange(256.0) - 128, (rows, 256)) * 2.0 ** -rng.integers(0, 3, (rows, 1))
    e8m0 = scale == jnp.uint8
    return weights.from_codes(
        jnp.asarray(rng.integers(0, 2**bits, (n, k), dtype=np.uint8)),
        jnp.asarray(table, lut),
        jnp.asarray(rng.integers(120, 130, shape) if e8m0 else rng.uniform(0.5, 2, shape), scale),
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16 if e8m0 else scale) if offsets else None,
        bits=bits,
        group_size=g,
        uniform=bits == 8,
    )


def rows(*shape: int, dtype: Any = jnp.bfloat16, seed: int = 7) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def exact(w: QuantizedTensor) -> tuple[np.ndarray, np.ndarray]:
    """W in float64, and the sum of its terms' magnitudes, by which roundings are judged."""
    terms = Terms.of(w)
    # A ramp's middle goes into the offset: its terms are the step's multiples.
    ramp = w.bits == 8
    size = np.abs(terms.table).max(1, keepdims=True) * terms.scales if ramp else np.abs(terms.scaled)
    return terms.scaled + terms.shift, size + np.abs(terms.shift)


def within(
    y: jax.Array, x: jax.Array, w: QuantizedTensor, unit: float, of_weights: float, of_sums: float = 32 * 2.0**-24
) -> None:
    """Every element is within what rounding explains.

    Args:
      unit: of the result's dtype, relative.
      of_weights: by which each weight may be off, relative; they err at random. 0 where none is rounded.
      of_sums: of float32 sums, relative to the magnitudes that are added. Tensor cores cut the bits that an addition
        shifts out instead of rounding them: twice a CPU's allowance.
    """
    assert y.dtype == x.dtype and y.shape == (x.shape[0], w.shape[0])
    dense, magnitude = exact(w)
    wide = np.asarray(x, np.float64)
    expected = wide @ dense.T
    slack = of_sums * (np.abs(wide) @ magnitude.T)
    if of_weights:
        slack = slack + of_weights * np.sqrt(wide**2 @ dense.T**2)
    error = np.abs(np.asarray(y, np.float64) - expected)
    np.testing.assert_array_less(error, slack + unit * np.abs(expected) + 1e-30)


@dataclasses.dataclass(frozen=True)
class Case:
    """A product: x [m, k] of `dtype` by a leaf [n, k] of `fields`."""

    m: int
    n: int
    k: int
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "bfloat16"

    def operands(self) -> tuple[jax.Array, QuantizedTensor]:
        return rows(self.m, self.k, dtype=self.dtype), leaf(self.n, self.k, **self.fields)


def _widths(bits: int) -> Iterator[Case]:
    """Numbers of rows on either side of those at which one kernel hands over to another."""
    for i, m in enumerate((1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 200)):
        yield Case(m, 37, 352, dict(bits=bits), HALVES[i % 2])
        yield Case(m, 37, 352, dict(bits=bits, g=32, offsets=False), HALVES[(i + 1) % 2])


def _groups(g: int) -> Iterator[Case]:
    """Several groups a tile and several tiles a group, and a short last one."""
    for k, m in itertools.product((1000, 1184, 1536), (1, 40, 100)):
        if g >= k or g & (g - 1) == 0:
            yield Case(m, 64, k, dict(g=g))


def _kinds(fields: dict[str, Any]) -> Iterator[Case]:
    for bits, (m, dtype) in itertools.product((2, 3, 4), ((1, "bfloat16"), (9, "float16"), (100, "bfloat16"))):
        yield Case(m, 64, 256, dict(bits=bits, g=32, **fields), dtype)


def _odd_shapes(bits: int) -> Iterator[Case]:
    for m, n, k in ((1, 1, 1), (3, 5, 31), (2, 17, 33), (65, 3, 70), (1, 9, 4100), (12, 9, 4100), (9, 4099, 96)):
        yield Case(m, n, k, dict(bits=bits, g=64))


_KINDS: dict[str, dict[str, Any]] = {
    "one table": dict(row_tables=False),
    "no offsets": dict(offsets=False),
    "e8m0": dict(scale=jnp.uint8),
    "e8m0, no offsets": dict(scale=jnp.uint8, offsets=False),
    "float32 scales": dict(scale=jnp.float32),
    "float16 scales": dict(scale=jnp.float16),
    "float16": dict(scale=jnp.float16, lut=jnp.float16),
    "float32 tables": dict(lut=jnp.float32),
}

CASES: dict[str, tuple[Case, ...]] = {
    **{f"{bits} bits": tuple(_widths(bits)) for bits in (2, 3, 4, 8)},
    **{f"groups of {g}": tuple(_groups(g)) for g in (16, 32, 64, 128, 256, 512, 1000, 2000)},
    **{name: tuple(_kinds(fields)) for name, fields in _KINDS.items()},
    **{f"odd shapes, {bits} bits": tuple(_odd_shapes(bits)) for bits in (2, 3, 4, 8)},
}


def identity_gives_the_weights_within_one_ulp(product: Product, w: QuantizedTensor, dtype: str) -> None:
    dense, magnitude = exact(w)
    k = w.shape[1]
    eye = jnp.eye(k, dtype=dtype)
    for first, last in ((0, k), (0, 1), (3, 9), (100, 120), (k - 64, k)):
        error = np.abs(np.asarray(product(eye[first:last], w), np.float64).T - dense[:, first:last])
        unit = ULP[dtype] * np.abs(dense) + 2.0**-22 * magnitude
        assert (error <= unit[:, first:last]).all()


def results_are_the_same_every_time(product: Product, counts: tuple[int, ...]) -> None:
    w = leaf(4096, 4096)
    for m in counts:
        x = rows(m, 4096)
        first = np.asarray(product(x, w))
        for _ in range(5):
            np.testing.assert_array_equal(product(x, w), first)


def values_that_are_not_finite_stay_in_their_rows(product: Product) -> None:
    for w, m in itertools.product((leaf(64, 512), leaf(21, 96, g=32)), (1, 5, 70)):
        k = w.shape[1]
        scales = w.scales.at[1, 2].set(jnp.inf).at[2, 0].set(jnp.nan)
        y = np.asarray(product(rows(m, k), dataclasses.replace(w, scales=scales)), np.float32)
        assert np.isfinite(np.delete(y, [1, 2], axis=1)).all() and not np.isfinite(y[:, [1, 2]]).any()
        bad = np.asarray(product(rows(m, k).at[0, 5].set(jnp.nan), w), np.float32)
        assert np.isnan(bad[0]).all() and np.isfinite(bad[1:]).all()


def more_weights_than_31_bits_count(product: Product, check: Check) -> None:
    """2^31 + 2^17 weights, whose rows lie beyond 2^30 bytes: 64 rows of random codes, the others zero."""
    n, k = 32768 + 64, 65536
    small = leaf(64, k)
    far = jnp.zeros((n, k // 2), jnp.uint8).at[-64:].set(small.codes)
    fill = lambda a: jnp.zeros((n, *a.shape[1:]), a.dtype).at[-64:].set(a)  # noqa: E731
    w = dataclasses.replace(
        small, codes=far, lut=fill(small.lut), scales=fill(small.scales), offsets=fill(small.offsets)
    )
    for m in (1, 3):
        x = rows(m, k)
        y = product(x, w)
        check(y[:, -64:], x, small)
        assert not np.asarray(y[:, :-64]).any()


def the_whole_result_is_written(
    product: Product,
    check: Check,
    leaves: tuple[QuantizedTensor, ...] | None = None,
    counts: tuple[int, ...] = (1, 7, 20, 64, 90),
) -> None:
    """The memory that results get was full of NaN a moment ago."""
    for w, m in itertools.product(leaves or (leaf(4032, 512), leaf(4001, 480, g=32)), counts):
        x = rows(m, w.shape[1])
        run = jax.jit(lambda x, w: product(x, w))
        run(x, w).block_until_ready()
        jnp.full((64, m, w.shape[0]), jnp.nan, jnp.bfloat16).block_until_ready()
        check(run(x, w), x, w)


def gradients_equal_those_of_xla(backend: str) -> None:
    w, x = leaf(64, 256), rows(3, 256)
    tables, codes = partition(w)

    def loss(x, t, backend):
        return jnp.sin(matmul(x, combine(t, codes), backend).astype(jnp.float32) / 64).sum()

    ours, theirs = (jax.grad(loss, (0, 1))(x, tables, name) for name in (backend, "xla"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= 0.02 * np.linalg.norm(b)
