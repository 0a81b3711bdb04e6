"""`kmeans_1d`: cluster every row of a matrix, in chunks of bounded memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.clustering.exact import block_size, exact_centroids
from any4_jax.clustering.inits import INITS, draw, running_sum
from any4_jax.clustering.intervals import build
from any4_jax.clustering.lloyd import lloyd_centroids

SOLVERS = ("exact", "lloyd")
# Bytes of temporaries of one chunk of rows.
_CHUNK_BYTES = 32 << 20


@functools.partial(jax.tree_util.register_dataclass, data_fields=("centroids", "codes", "inertia"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class KMeans:
    """Clusters of R rows of K values.

    centroids: float32 [R, k], ascending in each row; entries repeat where fewer than k are needed.
    codes: uint8 [R, K], the nearest centroid of each value, ties to the lower index.
    inertia: float32 [R], sum_j w[r, j] * (rows[r, j] - centroids[r, codes[r, j]])**2.
    """

    centroids: jax.Array
    codes: jax.Array
    inertia: jax.Array


def _power_of_two(values: jax.Array) -> jax.Array:
    """Largest power of two <= max |values| (1 where that is zero): dividing by it is exact."""
    exponent = jax.lax.bitcast_convert_type(jnp.max(jnp.abs(values)), jnp.int32) & 0x7F800000
    return jnp.where(exponent > 0, jax.lax.bitcast_convert_type(exponent, jnp.float32), 1.0)


def _nearest(x: jax.Array, centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Code (uint8) of each value and its distance to that centroid: shape of x each."""

    def closer(index: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        code, distance = best
        new = jnp.abs(x - centroids[index])
        return jnp.where(new < distance, index.astype(jnp.uint8), code), jnp.minimum(new, distance)

    first = (jnp.zeros(x.shape, jnp.uint8), jnp.full(x.shape, jnp.inf))
    return jax.lax.fori_loop(0, centroids.shape[0], closer, first)


def _padded(length: int) -> int:
    return 1 << max((length - 1).bit_length(), 1)


@functools.partial(jax.jit, static_argnames=("k", "solver", "init", "max_iter", "chunk_rows"))
def _solve(
    rows: jax.Array,
    weights: jax.Array | None,
    tol: jax.Array,
    draws: jax.Array | None,
    *,
    k: int,
    solver: str,
    init: str,
    max_iter: int,
    chunk_rows: int,
) -> KMeans:
    length = rows.shape[1]
    padded = _padded(length)

    def one_row(row: jax.Array, weight: jax.Array | None) -> KMeans:
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
        if solver == "exact":
            centroids = exact_centroids(table, length, k)
        else:
            start = INITS[init](table.x, table.w, k, draws)
            centroids = lloyd_centroids(table, start, max_iter, tol)
        centroids = centroids * unit
        codes, distance = _nearest(row, centroids)
        used = jnp.where(heaviest > 0, weight, 1.0)
        # The maximum keeps the product from joining a sum as a fused multiply-add.
        return KMeans(centroids, codes, running_sum(jnp.maximum(used * (distance * distance), 0.0))[-1])

    if weights is not None and weights.ndim == 2:
        return jax.lax.map(lambda both: one_row(*both), (rows, weights), batch_size=chunk_rows)
    return jax.lax.map(lambda row: one_row(row, weights), rows, batch_size=chunk_rows)


def _default_chunk(rows: int, length: int) -> int:
    """Rows solved together: within the chunk's memory, and a divisor of `rows` where one is near.

    A remainder is compiled as a second program of its own.
    """
    # What the exact solver holds of a row, and once more for what is derived from it: float32 errors to block ends and
    # within blocks, and three moments a level.
    size = block_size(length)
    bytes_of_row = 8 * length * (length // size + size + 3 * length.bit_length())
    most = max(1, min(rows, _CHUNK_BYTES // bytes_of_row))
    return next((c for c in range(most, most // 2, -1) if rows % c == 0), most)


def _check(rows: jax.Array, k: int, sample_weight: jax.Array | None, solver: str, init: str | None) -> None:
    """Refuse what shapes, dtypes and options alone show to be wrong."""
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"rows has shape {rows.shape}; kmeans_1d needs [R, K] with K >= 1.")
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        raise TypeError(f"rows has dtype {rows.dtype}; kmeans_1d needs a float dtype, so cast rows first.")
    if not 1 <= k <= 256:
        raise ValueError(f"k is {k}; codes are uint8, so choose k from 1 to 256.")
    if sample_weight is not None and sample_weight.shape not in (rows.shape, rows.shape[1:]):
        raise ValueError(
            f"sample_weight has shape {sample_weight.shape}; rows of shape {rows.shape} need "
            f"{rows.shape[1:]} or {rows.shape}."
        )
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}; choose one of {', '.join(SOLVERS)}.")
    if solver == "exact" and init is not None:
        raise ValueError(f'init is {init!r} but solver "exact" has no start; leave init None or use solver="lloyd".')
    if init is not None and init not in INITS:
        raise ValueError(f"init is {init!r}; choose one of {', '.join(INITS)}.")
    if init == "nf4" and k != 16:
        raise ValueError(f'init "nf4" has 16 levels but k is {k}; use k=16 or another init.')


def _check_values(name: str, values: jax.Array, *, signed: bool) -> None:
    """Refuse NaN, infinities and, unless signed, negative numbers in an array that is not being traced."""
    if isinstance(values, jax.core.Tracer) or values.size == 0:
        return
    low, high = _extremes(values)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{name} has NaN or infinite values; remove them before clustering.")
    if not signed and low < 0:
        raise ValueError(f"{name} has negative values (least {float(low):g}); weights must be >= 0.")


@jax.jit
def _extremes(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.min(values).astype(jnp.float32), jnp.max(values).astype(jnp.float32)


def kmeans_1d(
    rows: jax.Array,
    k: int,
    *,
    sample_weight: jax.Array | None = None,
    solver: str = "exact",
    init: str | None = None,
    max_iter: int = 300,
    tol: float = 1e-4,
    seed: int = 0,
    chunk_rows: int | None = None,
) -> KMeans:
    """Cluster each row of rows [R, K] (any float dtype, computed in float32) into k levels.

    sample_weight: None, [K] or [R, K], >= 0. A row whose weights are all zero is clustered unweighted.
    solver: "exact" finds the least inertia; "lloyd" a local one from `init`: "kmeans++" (None), "random",
        "int" (evenly spaced), "nf4" (k = 16) or "quantile".
    max_iter, tol, seed: Lloyd only. It stops when the squared shift of the centroids is at most tol times the
        row's weighted variance. Every row uses the same random numbers.
    chunk_rows: rows solved together (None: chosen from K). It bounds memory and changes no bit of the result,
        and neither does the order of the rows; rows * 2**n gives centroids * 2**n exactly.

    Weights more than 1e30 times smaller than a row's largest count as zero. Works under jit, where values are
    not checked. Raises ValueError for bad shapes, options, NaN, infinities or negative weights, TypeError for
    dtypes.
    """
    rows = rows if isinstance(rows, jax.Array) else np.asarray(rows)
    if sample_weight is not None and not isinstance(sample_weight, jax.Array):
        sample_weight = np.asarray(sample_weight)
    _check(rows, k, sample_weight, solver, init)
    if max_iter < 1 or not tol >= 0:
        raise ValueError(f"max_iter is {max_iter} and tol is {tol}; max_iter must be >= 1 and tol >= 0.")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; it must be at least 1, or None to choose it from K.")
    _check_values("rows", rows, signed=True)
    if sample_weight is not None:
        _check_values("sample_weight", sample_weight, signed=False)
    lloyd = solver == "lloyd"
    start = (init or "kmeans++") if lloyd else ""
    return _solve(
        rows,
        sample_weight,
        np.float32(tol),
        draw(start, _padded(rows.shape[1]), k, seed),
        k=k,
        solver=solver,
        init=start,
        max_iter=max_iter if lloyd else 0,
        chunk_rows=chunk_rows or _default_chunk(*rows.shape),
    )
