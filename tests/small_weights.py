"""Small weights of every operator, for the products' tests."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax import weights
from any4_jax.weights import LowRank, PermuteInput, QuantizeInput, ScaleInput, Sparse, Sum, Transposed

dequantize = jax.jit(weights.dequantize, static_argnums=1)

N, K, G, M = 6, 20, 8, 4


def leaf(bits: int, seed: int = 0, *, offsets: bool = True, ramp: bool = False, dtype=jnp.bfloat16):
    rng = np.random.default_rng(seed)
    table = np.arange(2.0**bits)[None] - 2 ** (bits - 1) if ramp else np.sort(rng.normal(size=(N, 2**bits)), axis=1)
    groups = -(-K // G)
    return weights.from_codes(
        jnp.asarray(rng.integers(0, 2**bits, (N, K), dtype=np.uint8)),
        jnp.asarray(table, dtype),
        jnp.asarray(rng.uniform(0.5, 2, (N, groups)) / (2 ** (bits - 1) if ramp else 1), dtype),
        jnp.asarray(rng.normal(size=(N, groups)), dtype) if offsets else None,
        bits=bits,
        group_size=G,
        uniform=ramp,
    )


def integer_tables(seed: int = 0):
    """Tables that hold both ends of what they may."""
    plain = leaf(4, seed)
    table = np.round(np.asarray(plain.lut, np.float32) * 50).clip(-127, 127)
    table[:, 0], table[:, -1] = -127, 127
    return dataclasses.replace(plain, lut=jnp.asarray(table, jnp.int8), scales=plain.scales / jnp.bfloat16(50))


def nested(seed: int = 0):
    """Scales that are quantized themselves, along the rows and across them."""
    plain = leaf(4, seed, dtype=jnp.float32)
    table = jnp.linspace(0, 2, 256)[None]
    scales = weights.encode(plain.scales, table, jnp.ones((N, 1)), None, bits=8, group_size=K)
    ones = jnp.ones((plain.offsets.shape[1], 2), jnp.bfloat16)
    ramp = jnp.arange(-4.0, 4)[None]
    offsets = weights.encode(plain.offsets.T, ramp, ones / 2, ones / 4, bits=3, group_size=4, uniform=True)
    return dataclasses.replace(plain, scales=scales, offsets=Transposed(offsets))


def spqr(seed: int = 0) -> PermuteInput:
    """A coded matrix whose scales are coded, and outliers, behind inputs in another order."""
    order = np.random.default_rng(seed).permutation(K)
    return PermuteInput(Sum((nested(seed), sparse(seed))), jnp.asarray(order, jnp.int32))


def low_rank(seed: int = 0, rank: int = 3) -> LowRank:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rank, K)), rng.normal(size=(N, rank))
    return LowRank(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), jnp.float32(0.3))


def entries(rows, columns, values, n: int, k: int, blocks: int = 1, padding: int = 0) -> Sparse:
    """The matrix of entries whose rows ascend, with so many places of padding in its fullest block, which must be the
    last; padding has columns and values too, which count for nothing."""
    rows, columns, values = np.asarray(rows), np.asarray(columns), np.asarray(values)
    counts = np.bincount(rows, minlength=n).reshape(blocks, -1)
    size = counts.sum(axis=1).max() + padding
    made = np.full((2, blocks, size), 3.0)
    for block, count in enumerate(counts.sum(axis=1)):
        mine = rows * blocks // n == block
        made[:, block, :count] = columns[mine], values[mine]
    ends = jnp.asarray(np.cumsum(counts, axis=1).reshape(n), jnp.int32)
    return Sparse(ends, jnp.asarray(made[0], jnp.uint16), jnp.asarray(made[1], jnp.float32), k)


def sparse(seed: int = 0) -> Sparse:
    """Six entries in two blocks of rows, two of them in one place, and padding."""
    rng = np.random.default_rng(seed)
    rows = np.sort([*rng.integers(0, N, 2), *rng.integers(0, 3, 2), 4, 4])
    columns = np.where(rows == 4, 1, rng.integers(0, K, 6))
    return entries(rows, columns, rng.normal(size=6), N, K, blocks=2, padding=1)


def operator(name: str, seed: int = 0):
    rng = np.random.default_rng(seed + 100)
    dense = jnp.asarray(rng.normal(size=(N, K)), jnp.float32)
    scale = jnp.asarray(rng.uniform(0.5, 2, K), jnp.float32)
    return {
        "dense": lambda: dense,
        "1 bit": lambda: leaf(1, seed),
        "3 bits": lambda: leaf(3, seed),
        "4 bits": lambda: leaf(4, seed),
        "int8 tables": lambda: integer_tables(seed),
        "8 bits": lambda: leaf(8, seed, offsets=False, ramp=True),
        "nested": lambda: nested(seed),
        "Sum": lambda: Sum((leaf(4, seed), leaf(1, seed + 1), dense)),
        "ScaleInput": lambda: ScaleInput(leaf(4, seed), scale),
        "PermuteInput": lambda: PermuteInput(leaf(4, seed), jnp.asarray(rng.permutation(K), jnp.int32)),
        "LowRank": lambda: low_rank(seed),
        "Sum with LowRank": lambda: Sum((leaf(4, seed), low_rank(seed))),
        "Sparse": lambda: sparse(seed),
        "SpQR": lambda: spqr(seed),
    }[name]()


NAMES = ("dense", "1 bit", "3 bits", "4 bits", "int8 tables", "8 bits", "nested", "Sum", "ScaleInput", "PermuteInput")
NAMES += ("LowRank", "Sum with LowRank", "Sparse", "SpQR")


def rows(*shape: int, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(7).normal(size=(*shape, K)), dtype)


def reference(x, w) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(dequantize(w), np.float64).T


INTEGERS = QuantizeInput(leaf(8, ramp=True), None, 8, True, "token")
