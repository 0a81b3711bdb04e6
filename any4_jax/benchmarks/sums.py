"""Random weights that are sums: of binary planes, as BCQ stores them, and of codes and outliers, as SpQR does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.benchmarks.shapes import random_leaf
from any4_jax.formats import ramp
from any4_jax.weights import QuantizedTensor, Sparse, Sum, Transposed, from_codes

GROUP, ROWS, BITS = 16, 16, 3
"""SpQR's groups, rows that share the range of their scales' codes, and bits of all codes."""
OUTLIERS = 0.01
"""The share of a matrix that is stored beside its codes."""


def planes_of(q: QuantizedTensor) -> Sum:
    """The bits of the codes as binary planes, whose scales halve from one to the next."""
    table, codes = jnp.asarray([[-1, 1]], jnp.bfloat16), q.unpacked_codes()
    form: dict[str, Any] = dict(bits=1, group_size=q.group_size, uniform=True)
    return Sum(tuple(from_codes((codes >> i) & 1, table, q.scales / 2**i, None, **form) for i in range(q.bits)))


def random_planes(seed: int, n: int, k: int, bits: int, group_size: int) -> Sum:
    """A sum of so many binary planes [N, K] with random codes and scales."""
    levels: dict[str, Any] = dict(levels=(-1.0, 1.0), offsets=False, uniform=True)
    return Sum(tuple(random_leaf(seed * bits + i, n, k, 1, group_size, **levels) for i in range(bits)))


def random_outliers(seed: int, n: int, k: int) -> Sum:
    """SpQR's weight [N, K]: 3 bits in groups of 16, whose scales and offsets have 3 bits too, beside every hundredth
    weight. Its values are about 1 / sqrt(K)."""
    coded = random_leaf(seed, n, k, BITS, GROUP, levels=ramp(BITS), uniform=True)
    scales, offsets = (_coded(2 * seed + i, n, -(-k // GROUP), k**-0.5 * size) for i, size in enumerate((0.05, 0.2)))
    coded = QuantizedTensor(coded.codes, coded.lut, scales, offsets, BITS, GROUP, coded.padding, uniform=True)
    return Sum((coded, _entries(seed, n, k)))


def _coded(seed: int, n: int, groups: int, size: float) -> Transposed:
    """Scales [N, groups] of about `size`, coded along the rows."""
    leaf = random_leaf(seed, groups, n, BITS, ROWS, levels=ramp(BITS), uniform=True)
    scales, offsets = (jnp.full_like(a, size * by) for a, by in ((leaf.scales, 0.05), (leaf.scales, 1)))
    return Transposed(QuantizedTensor(leaf.codes, leaf.lut, scales, offsets, BITS, ROWS, leaf.padding, uniform=True))


def _entries(seed: int, n: int, k: int) -> Sparse:
    rng = np.random.default_rng(seed)
    a_row = max(1, round(OUTLIERS * k))
    # One column in each of as many equal parts of a row, so that none is there twice.
    parts = np.linspace(0, k, a_row + 1).astype(np.int64)
    columns = rng.integers(parts[:-1], parts[1:], (n, a_row))
    index = np.uint16 if k <= 1 << 16 else np.int32
    ends = np.arange(1, n + 1, dtype=np.int32) * a_row
    values = jax.random.normal(jax.random.key(seed), (1, n * a_row), jnp.bfloat16) * k**-0.5
    return Sparse(jnp.asarray(ends), jnp.asarray(columns.reshape(1, -1), index), values, k)
