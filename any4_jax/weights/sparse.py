"""A matrix of few entries, such as the outliers beside a coded one (SpQR, arXiv 2306.03078)."""

import math

import jax
import jax.numpy as jnp

from any4_jax.weights.operator import Operator, dequantize, operator, product, take_rows


@operator(static=("n", "k"), axes={"rows": ".", "columns": ".", "values": "."})
class Sparse(Operator):
    """W[n, k] = the sum of the values whose row is n and whose column is k; zero where there is none.

    Matrices with the same number of entries, E, can be stacked; one with fewer is padded with entries of value zero, at
    any row and column.

    Attributes:
      rows: int32 [*L, E], from 0 to N - 1.
      columns: int32 [*L, E], from 0 to K - 1.
      values: floating [*L, E].
      n, k: N and K (static).
    """

    rows: jax.Array
    columns: jax.Array
    values: jax.Array
    n: int
    k: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(*L, N, K)."""
        return (*self.values.shape[:-1], self.n, self.k)


@dequantize.register
def _(w: Sparse, dtype=jnp.float32) -> jax.Array:
    stack = w.values.shape[:-1]
    flat = (array.reshape(math.prod(stack), -1) for array in (w.rows, w.columns, w.values))
    matrices = jax.vmap(lambda rows, columns, values: _scattered(rows, columns, values, w.n, w.k))(*flat)
    return matrices.reshape(*stack, w.n, w.k).astype(dtype)


def _scattered(rows: jax.Array, columns: jax.Array, values: jax.Array, n: int, k: int) -> jax.Array:
    """The float32 matrix [n, k] of the entries; entries outside of it are dropped."""
    return jnp.zeros((n, k)).at[rows, columns].add(values.astype(jnp.float32), mode="drop")


@product.register
def _(w: Sparse, x, backend=None):
    terms = x[:, w.columns].astype(jnp.float32) * w.values.astype(jnp.float32)[None]
    return jnp.zeros((x.shape[0], w.n)).at[:, w.rows].add(terms).astype(x.dtype)


@take_rows.register
def _(w: Sparse, rows):
    rows = jnp.clip(rows, 0, w.n - 1)
    count = rows.shape[0]
    # Where a row is asked for twice, its entries go to one place, which both of the results read.
    place = jnp.full(w.n, count, jnp.int32).at[rows].set(jnp.arange(count, dtype=jnp.int32))
    return _scattered(place[w.rows], w.columns, w.values, count, w.k)[place[rows]]
