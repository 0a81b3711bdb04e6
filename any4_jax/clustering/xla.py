"""The solver in jax.numpy: it runs on every platform, and is the reference that the other backends must match."""

import dataclasses

import jax
import jax.numpy as jnp

from any4_jax.clustering.exact import block_size, exact_centroids
from any4_jax.clustering.inits import INITS, running_sum
from any4_jax.clustering.intervals import build
from any4_jax.clustering.lloyd import lloyd_centroids

# Bytes that the temporaries of one chunk of rows may take.
_CHUNK_BYTES = 32 << 20

Clusters = tuple[jax.Array, jax.Array, jax.Array]
"""Centroids float32 [R, k], codes uint8 [R, K], inertia float32 [R], as `KMeans` describes them."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of `kmeans_1d` that are known while tracing."""

    k: int
    solver: str
    init: str
    max_iter: int
    chunk_rows: int


def _power_of_two(values: jax.Array) -> jax.Array:
    """Largest power of two <= max |values| (1 where that is zero): dividing by it is exact."""
    exponent = jax.lax.bitcast_convert_type(jnp.max(jnp.abs(values)), jnp.int32) & 0x7F800000
    return jnp.where(exponent > 0, jax.lax.bitcast_convert_type(exponent, jnp.float32), 1.0)


def _nearest(x: jax.Array, centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Code (uint8) of each value and its distance to that centroid, both of the shape of x."""

    def closer(index: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        code, distance = best
        new = jnp.abs(x - centroids[index])
        return jnp.where(new < distance, index.astype(jnp.uint8), code), jnp.minimum(new, distance)

    first = (jnp.zeros(x.shape, jnp.uint8), jnp.full(x.shape, jnp.inf))
    return jax.lax.fori_loop(0, centroids.shape[0], closer, first)


def padded_length(length: int) -> int:
    """Rows are padded to a power of two of at least 2 values."""
    return 1 << max((length - 1).bit_length(), 1)


def solve(
    rows: jax.Array,
    weights: jax.Array | None,
    tol: jax.Array,
    numbers: jax.Array | None,
    options: Options,
) -> Clusters:
    """Clusters of rows [R, K] under weights [K], [R, K] or None; tol and numbers (inits.py) are Lloyd's."""
    length = rows.shape[1]
    padded = padded_length(length)

    def one_row(row: jax.Array, weight: jax.Array | None) -> Clusters:
        row = row.astype(jnp.float32)
        weight = jnp.ones_like(row) if weight is None else weight.astype(jnp.float32)
        unit = _power_of_two(row)
        heaviest = jnp.max(weight)
        share = jnp.where(heaviest > 0, weight / _power_of_two(weight), 1.0)
        if weights is None:
            x, w = jax.lax.sort(row / unit), share
        else:
            x, w = jax.lax.sort((row / unit, share), num_keys=1)
        table = build(jnp.pad(x, (0, padded - length), mode="edge"), jnp.pad(w, (0, padded - length)))
        if options.solver == "exact":
            centroids = exact_centroids(table, length, options.k)
        else:
            start = INITS[options.init](table.x, table.w, options.k, numbers)
            centroids = lloyd_centroids(table, start, options.max_iter, tol)
        centroids = centroids * unit
        codes, distance = _nearest(row, centroids)
        used = jnp.where(heaviest > 0, weight, 1.0)
        # The maximum keeps the product from joining a sum as a fused multiply-add.
        return centroids, codes, running_sum(jnp.maximum(used * (distance * distance), 0.0))[-1]

    if weights is not None and weights.ndim == 2:
        return jax.lax.map(lambda both: one_row(*both), (rows, weights), batch_size=options.chunk_rows)
    return jax.lax.map(lambda row: one_row(row, weights), rows, batch_size=options.chunk_rows)


def default_chunk(rows: int, length: int) -> int:
    """Rows solved together: within the chunk's memory, and a divisor of `rows` where one is near.

    A remainder is compiled as a second program of its own.
    """
    # What the exact solver holds for a row (float32 errors to block ends and within blocks, and three moments a level),
    # twice: once more for what is derived from it.
    size = block_size(length)
    bytes_of_row = 8 * length * (length // size + size + 3 * length.bit_length())
    most = max(1, min(rows, _CHUNK_BYTES // bytes_of_row))
    return next((c for c in range(most, most // 2, -1) if rows % c == 0), most)
