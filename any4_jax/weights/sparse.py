"""A matrix of few entries, such as the outliers beside a coded one (SpQR, arXiv 2306.03078)."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.weights.operator import Operator, dense_product, dequantize, operator, take_rows

BLOCKS = 8
"""Blocks of rows in what `nonzeros` makes, where so many divide N: among up to so many devices rows can be split. Each
block is padded to the fullest one; blocks of many rows are nearly alike."""


@operator(static=("k",), axes={"ends": "N", "columns": "N.", "values": "N."})
class Sparse(Operator):
    """W[n, k] = the sum of the values of row n whose column is k; zero where there is none.

    Rows lie in B blocks of N / B rows each. The entries of a block are in one row of `columns` and `values`, sorted by
    their rows; those of row n end before entry ends[n] of its block, and begin where those of the row before in the
    block end, or at 0. What comes after those of the block's last row is padding, and counts for nothing. So matrices
    of as many blocks stack once they are padded alike (`padded_alike`), and blocks are split among devices as rows are.

    Attributes:
      ends: uint16 or int32 [*L, N].
      columns: uint16 or int32 [*L, B, E], from 0 to K - 1. B divides N.
      values: floating [*L, B, E].
      k: K (static).
    """

    ends: jax.Array
    columns: jax.Array
    values: jax.Array
    k: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(*L, N, K)."""
        return (*self.ends.shape, self.k)


def nonzeros(w: jax.Array, dtype: Any = jnp.bfloat16, blocks: int = BLOCKS) -> Sparse:
    """The entries of a matrix [N, K] that are not zero.

    Under jit their number is unknown, and there is room for all of the matrix; `trimmed` takes off what is too much.

    Args:
      w: floating [N, K].
      dtype: in which values are stored; it has to hold those of w.
      blocks: the number of blocks; where it doesn't divide N, its largest factor that does.
    """
    n, k = w.shape
    blocks = math.gcd(n, blocks)
    filled = (w != 0).reshape(blocks, -1)
    size = filled.shape[1]
    place = jnp.where(filled, jnp.cumsum(filled, axis=1) - 1, size)
    columns = jnp.broadcast_to(jnp.arange(k, dtype=_index_dtype(k)), (n, k)).reshape(blocks, size)

    def packed(entries: jax.Array) -> jax.Array:
        # Every entry has a place of its own but those beyond the end, which are dropped.
        return jax.vmap(lambda at, each: jnp.zeros(size, each.dtype).at[at].set(each, mode="drop"))(place, entries)

    ends = jnp.cumsum((w != 0).reshape(blocks, n // blocks, k).sum(axis=2, dtype=jnp.int32), axis=1)
    return trimmed(Sparse(ends.reshape(n), packed(columns), packed(w.reshape(blocks, size).astype(dtype)), k))


def _index_dtype(end: int) -> Any:
    """The narrowest dtype for the numbers below `end` that Sparse takes."""
    return jnp.uint16 if end <= 1 << 16 else jnp.int32


def trimmed(tree: Any) -> Any:
    """A tree with every Sparse in it cut to the entries of its fullest block; traced ones stay as they are."""
    return jax.tree.map(lambda w: _cut(w) if isinstance(w, Sparse) else w, tree, is_leaf=_is_sparse)


def padded_alike(trees: Sequence[Any]) -> list[Any]:
    """Trees of one structure with every Sparse padded to the size of the largest in its place, so that they stack."""
    first, *_ = trees
    each = [jax.tree.flatten(tree, is_leaf=_is_sparse) for tree in trees]
    places = zip(*(nodes for nodes, _ in each), strict=True)
    alike = [_alike(nodes) if isinstance(nodes[0], Sparse) else nodes for nodes in places]
    structure = jax.tree.structure(first, is_leaf=_is_sparse)
    return [jax.tree.unflatten(structure, nodes) for nodes in zip(*alike, strict=True)]


def with_room(tree: Any) -> Any:
    """A tree with every Sparse in it padded to the next sixteenth of what its matrix could hold, so that one program
    serves matrices of about as many entries."""
    return jax.tree.map(lambda w: _with_room(w) if isinstance(w, Sparse) else w, tree, is_leaf=_is_sparse)


def _with_room(w: Sparse) -> Sparse:
    step = -(-math.prod(w.shape[-2:]) // w.values.shape[-2] // 16)
    return _resized(w, -(-w.values.shape[-1] // step) * step, jnp.int32)


def _is_sparse(node: Any) -> bool:
    return isinstance(node, Sparse)


def _cut(w: Sparse) -> Sparse:
    if any(isinstance(array, jax.core.Tracer) for array in (w.ends, w.columns, w.values)):
        return w
    most = int(np.max(w.ends, initial=0))
    return _resized(w, most, _index_dtype(most + 1))


def _alike(each: Sequence[Sparse]) -> list[Sparse]:
    size, dtype = max(w.values.shape[-1] for w in each), jnp.result_type(*(w.ends for w in each))
    return [_resized(w, size, dtype) for w in each]


def _resized(w: Sparse, size: int, ends_dtype: Any) -> Sparse:
    """The matrix with `size` places in each block. In numpy, since jax would compile a program for each size."""
    axes = [(0, 0)] * (w.values.ndim - 1) + [(0, max(size - w.values.shape[-1], 0))]
    columns, values = (jnp.asarray(np.pad(np.asarray(a)[..., :size], axes)) for a in (w.columns, w.values))
    return Sparse(jnp.asarray(np.asarray(w.ends).astype(ends_dtype)), columns, values, w.k)


def _rows(w: Sparse) -> jax.Array:
    """The row of each entry, int32 [B, E]; N, which is none, for padding."""
    blocks, size = w.values.shape
    ends = w.ends.astype(jnp.int32).reshape(blocks, -1)
    places = jnp.arange(size, dtype=jnp.int32)
    within = jax.vmap(lambda ends: jnp.searchsorted(ends, places, side="right"))(ends)
    first = jnp.arange(blocks, dtype=jnp.int32)[:, None] * ends.shape[1]
    return jnp.where(within < ends.shape[1], first + within, w.ends.shape[0])


def _scattered(rows: jax.Array, columns: jax.Array, values: jax.Array, n: int, k: int) -> jax.Array:
    """The float32 matrix [n, k] of the entries; entries outside of it are dropped."""
    return jnp.zeros((n, k)).at[rows, columns.astype(jnp.int32)].add(values.astype(jnp.float32), mode="drop")


@dequantize.register
def _(w: Sparse, dtype=jnp.float32) -> jax.Array:
    *stack, n, k = w.shape
    count = math.prod(stack)
    flat = jax.tree.map(lambda array: array.reshape(count, *array.shape[len(stack) :]), w)
    matrices = jax.vmap(lambda one: _scattered(_rows(one), one.columns, one.values, n, k))(flat)
    return matrices.reshape(*stack, n, k).astype(dtype)


def sparse_product(x: jax.Array, w: Sparse) -> jax.Array:
    """x W^T [M, N] in x's dtype, for x [M, K] and W [N, K], in jax.numpy."""
    n, k = w.shape
    if x.shape[0] * w.values.size > n * k:
        # So many terms would take more room than the matrix, and more time than its product.
        return dense_product(x, dequantize(w, x.dtype))
    terms = x[:, w.columns.reshape(-1).astype(jnp.int32)].astype(jnp.float32)
    terms = terms * w.values.reshape(1, -1).astype(jnp.float32)
    return jnp.zeros((x.shape[0], n)).at[:, _rows(w).reshape(-1)].add(terms, mode="drop").astype(x.dtype)


@take_rows.register
def _(w: Sparse, rows):
    n, k = w.shape
    rows = jnp.clip(rows, 0, n - 1)
    count = rows.shape[0]
    # Where a row is asked for twice, its entries go to one place, which both of the results read.
    place = jnp.full(n + 1, count, jnp.int32).at[rows].set(jnp.arange(count, dtype=jnp.int32))
    return _scattered(place[_rows(w)], w.columns, w.values, count, k)[place[rows]]
