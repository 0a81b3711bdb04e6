"""Weighted one-dimensional k-means on the CPU, over plain arrays: the exact optimum, and Lloyd's iteration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import registration

TARGET = "any4_cpu_kmeans"

Clusters = tuple[jax.Array, jax.Array, jax.Array]
"""Centroids, codes and inertia, as `exact` returns them."""


def exact(rows: jax.Array, weights: jax.Array | None, *, k: int, isa: str = "auto") -> Clusters:
    """The k clusters of least weighted squared error of each row.

    A row's result depends on that row alone: not on other rows, nor on the number of threads. Rows with NaN or infinite
    values give NaN. Under vmap it stays one call, with more rows.

    Args:
      rows: float32 [R, K], K >= 1.
      weights: float32 [K] or [R, K], at least 0, or None. A weight more than 1e30 times smaller than the row's largest
        counts as zero; where all of a row's are zero, they count as one.
      k: 1 to 256.
      isa: the instruction set: "avx512", "avx2", "portable", or "auto" for the best that this processor has.

    Returns:
      centroids float32 [R, k], ascending, the first one repeated where fewer than k suffice; codes uint8 [R, K], the
      nearest centroid of each value, ties to the lower; inertia float32 [R], the sum of weight * distance**2.

    Raises:
      RuntimeError: the library can't be used; `registration.why_not("cpu")` says why without raising.
    """
    registration.register("cpu")
    none = jnp.zeros((0,), jnp.float32)
    return _call(k, "none", 0, isa)(rows, none if weights is None else weights, none, jnp.float32(0))


def lloyd(
    rows: jax.Array,
    weights: jax.Array | None,
    numbers: jax.Array,
    tol: jax.Array,
    *,
    k: int,
    start: str,
    max_iter: int,
    isa: str = "auto",
) -> Clusters:
    """Lloyd's iteration on each row. rows, weights, isa, the result and what is raised are as in `exact`.

    Args:
      numbers: float32, what the start needs. "plus_plus": fractions of the mass to draw at, [k, draws a step], at most
        8 draws; "random": exponentials, at least [K]; "spread": places between the row's minimum (0) and its maximum
        (1), [k]; "quantile": fractions of the row's weight, [k].
      tol: float32 scalar; steps end when the centroids' squared shift is at most tol times the row's weighted variance.
      start: "plus_plus", "random", "spread" or "quantile".
      max_iter: the most steps, at least 1.
    """
    registration.register("cpu")
    none = jnp.zeros((0,), jnp.float32)
    return _call(k, start, max_iter, isa)(rows, none if weights is None else weights, numbers, tol)


def folded(call, axis_size: int, batched, rows: jax.Array, weights: jax.Array):
    """What a rule of custom_vmap returns for `call(rows, weights)`: one call, with more rows.

    Args:
      batched: whether rows and weights have the mapped axis, which then is their first; further entries are ignored.
      weights: an array of no elements stands for absent ones.
    """
    rows = rows if batched[0] else jnp.broadcast_to(rows, (axis_size, *rows.shape))
    shape = rows.shape
    if batched[1] and weights.ndim == 2:
        weights = weights[:, None]
    if weights.size > 0 and weights.ndim > 1:
        weights = jnp.broadcast_to(weights, shape).reshape(-1, shape[-1])
    found = call(rows.reshape(-1, shape[-1]), weights)
    return tuple(a.reshape(*shape[:2], *a.shape[1:]) for a in found), (True, True, True)


def outputs(rows: jax.Array, k: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes and dtypes of `Clusters`."""
    count, length = rows.shape
    return (
        jax.ShapeDtypeStruct((count, k), jnp.float32),
        jax.ShapeDtypeStruct((count, length), jnp.uint8),
        jax.ShapeDtypeStruct((count,), jnp.float32),
    )


@functools.cache
def _call(k: int, start: str, max_iter: int, isa: str):
    """The custom call on (rows, weights, numbers, tol) with its rule for vmap; absent weights have no elements."""

    @jax.custom_batching.custom_vmap
    def call(rows, weights, numbers, tol):
        run = jax.ffi.ffi_call(TARGET, outputs(rows, k))
        return tuple(run(rows, weights, numbers, tol, start=start, max_iter=np.int64(max_iter), isa=isa))

    @call.def_vmap
    def _rule(axis_size, batched, rows, weights, numbers, tol):
        if batched[2] or batched[3]:
            taken = [
                a if b else jnp.broadcast_to(a, (axis_size, *a.shape))
                for a, b in zip((rows, weights, numbers, tol), batched, strict=True)
            ]
            return jax.lax.map(lambda one: call(*one), taken), (True, True, True)
        return folded(lambda rows, weights: call(rows, weights, numbers, tol), axis_size, batched, rows, weights)

    return call
