"""`kmeans_1d`: cluster every row of a matrix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.clustering import inits
from any4_jax.clustering.backends import BACKENDS, solve
from any4_jax.clustering.xla import Options, default_chunk, padded_length
from any4_jax.pytree import register_dataclass

SOLVERS = ("exact", "lloyd")


@functools.partial(register_dataclass, data_fields=("centroids", "codes", "inertia"), meta_fields=())
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


def _check(rows: jax.Array, k: int, sample_weight: jax.Array | None, solver: str, init: str | None) -> None:
    """Refuses what shapes, dtypes and options alone show to be wrong."""
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
    if init is not None and init not in inits.INITS:
        raise ValueError(f"init is {init!r}; choose one of {', '.join(inits.INITS)}.")
    if init == "nf4" and k != 16:
        raise ValueError(f'init "nf4" has 16 levels but k is {k}; use k=16 or another init.')


def _check_values(name: str, values: jax.Array, *, signed: bool) -> None:
    """Refuses NaN, infinities and, unless signed, negative numbers in an array that is not being traced."""
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
    backend: str | None = None,
) -> KMeans:
    """Clusters each row of a matrix into k levels. It works under jit, where values are not checked.

    Rows don't affect each other, and rows * 2**n gives centroids * 2**n exactly. Weights more than 1e30 times smaller
    than a row's largest count as zero.

    Args:
      rows: [R, K], any float dtype; computed in float32.
      k: 1 to 256.
      sample_weight: [K] or [R, K], at least 0, or None. A row whose weights are all zero is clustered unweighted.
      solver: "exact" finds the least inertia, "lloyd" a local minimum from `init`.
      init: "kmeans++" (what None means), "random", "int" (evenly spaced), "nf4" (k = 16) or "quantile"; only for Lloyd.
      max_iter: the most steps that Lloyd's iteration takes.
      tol: Lloyd's iteration stops when the centroids' squared shift is at most tol times the row's weighted variance.
      seed: for Lloyd's random numbers, which are the same for every row.
      chunk_rows: how many rows "xla" solves together; None chooses the number from K. It bounds memory and changes no
        bit of the result.
      backend: "cuda" (NVIDIA GPUs, the exact solver alone), "cpu" (C++) or "xla" (everywhere); None takes the first
        that works where the program runs. They agree up to float32 rounding, and in the codes unless another clustering
        is as good.

    Raises:
      ValueError: shapes or options don't fit, values are NaN or infinite, weights are negative, or the named backend
        doesn't exist or can't run here.
      TypeError: rows aren't floating.
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
    backend = BACKENDS.choose(backend, solver, arrays=(rows, sample_weight))
    lloyd = solver == "lloyd"
    start = (init or "kmeans++") if lloyd else ""
    options = Options(
        k=k,
        solver=solver,
        init=start,
        max_iter=max_iter if lloyd else 0,
        chunk_rows=chunk_rows or default_chunk(*rows.shape),
    )
    numbers = inits.numbers(start, padded_length(rows.shape[1]), k, seed) if lloyd else None
    with jax.numpy_rank_promotion("allow"):  # the caller's setting is about the caller's code, not the solvers'
        return KMeans(*solve(rows, sample_weight, np.float32(tol), numbers, options=options, backend=backend))
