"""Exact weighted one-dimensional k-means on NVIDIA GPUs, over plain arrays."""

import functools

import jax
import jax.numpy as jnp

from cuda_ffi import registration
from cuda_ffi.kmeans import Clusters, folded, outputs

TARGET = "any4_cuda_kmeans"


def exact(rows: jax.Array, weights: jax.Array | None, *, k: int) -> Clusters:
    """The k clusters of least weighted squared error of each row; it agrees with `cuda_ffi.kmeans.exact`.

    A block of threads solves a row, and all blocks together take up to 512 MB of device memory: a row of 4096 values
    and 16 clusters takes 0.8 MB. A row's result depends on that row alone. Under vmap it stays one call, with more
    rows.

    Args:
      rows: float32 [R, K], K from 1 to 2**25.
      weights: float32 [K] or [R, K], at least 0, or None.
      k: 1 to 256.

    Returns:
      centroids float32 [R, k], codes uint8 [R, K], inertia float32 [R].

    Raises:
      RuntimeError: the library can't be used; `registration.why_not("cuda")` says why without raising.
    """
    registration.register("cuda")
    return _call(k)(rows, jnp.zeros((0,), jnp.float32) if weights is None else weights)


@functools.cache
def _call(k: int):
    """The custom call on (rows, weights) with its rule for vmap; absent weights have no elements."""

    @jax.custom_batching.custom_vmap
    def call(rows, weights):
        return tuple(jax.ffi.ffi_call(TARGET, outputs(rows, k))(rows, weights))

    @call.def_vmap
    def _rule(axis_size, batched, rows, weights):
        return folded(call, axis_size, batched, rows, weights)

    return call
