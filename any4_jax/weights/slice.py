"""One matrix of a stack, a layer's or an expert's, as an operator that kernels read in place."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.weights.operator import Operator, dequantize, operator, take_rows
from any4_jax.weights.quantized_tensor import QuantizedTensor

_STACKED = 3
"""The least number of axes of a stack: [L, N, K]."""


@operator(axes={"stack": ".*NK", "index": ""})
class Slice(Operator):
    """W = stack[index]: one matrix of a leaf with a leading axis.

    Attributes:
      stack: [L, N, K], or with more axes after L, which further calls of `take` index one by one.
      index: int32 []; clipped to 0..L - 1.
    """

    stack: QuantizedTensor
    index: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K), after the axes of the stack that are left, if any."""
        return self.stack.shape[1:]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays of this one matrix."""
        return self.stack.nbytes // self.stack.shape[0]

    def matrix(self) -> QuantizedTensor:
        """The matrix by itself: a copy, unless XLA fuses it into what reads it."""
        return _indexed(self.stack, self.index)


def leaf_of(w: Any) -> QuantizedTensor | None:
    """The leaf whose arrays a kernel reads: the weight itself, or the stack of a Slice; None for any other weight."""
    stored = w.stack if isinstance(w, Slice) else w
    return stored if isinstance(stored, QuantizedTensor) else None


def take(stacked: Any, index: jax.Array | int) -> Any:
    """Takes one matrix from weights that are stacked along their first axis, without copying the codes.

    In a loop, `matmul(x, take(stacked, i))` gives what `lax.scan` over `stacked` gives. But scan copies each layer's
    codes out of the stack, where a backend with `Backend.takes_slices` (cuda) reads them in place. The same goes for
    experts: `matmul_each(x, [take(experts, i), take(experts, j)])`.

    Args:
      stacked: an operator whose arrays all have a leading axis L, or any tree of such operators and arrays.
      index: an integer from 0 to L - 1, or int32 [] that may be traced; a traced one is clipped.

    Returns:
      The same tree with a `Slice` in place of each QuantizedTensor; other arrays are indexed. `take` works on slices
      too: `take(take(w, i), j)` is expert j of layer i where w has the axes L, E, N, K.

    Raises:
      TypeError: the index is no integer.
      ValueError: an index that is not traced is outside of the stack, or the tree has no leading axis.
    """
    at = _checked(stacked, index)
    return jax.tree.map(
        lambda node: _TAKEN.get(type(node), _indexed)(node, at), stacked, is_leaf=lambda node: type(node) in _TAKEN
    )


def _checked(stacked: Any, index: Any) -> jax.Array:
    """The index as int32 []."""
    dtype = getattr(index, "dtype", np.dtype(type(index)) if type(index) in (int, float, bool) else None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer) or np.ndim(index) != 0:
        raise TypeError(f"got the index {index!r} of a stack, need one integer; pass a number from 0 on")
    nodes = jax.tree.leaves(stacked, is_leaf=lambda node: type(node) is Slice)
    sizes = {tuple(node.shape[:1]) for node in nodes}
    leaves = jax.tree.leaves(stacked, is_leaf=lambda node: type(node) is QuantizedTensor)
    single = any(type(leaf) is QuantizedTensor and len(leaf.shape) < _STACKED for leaf in leaves)
    if single or len(sizes) != 1 or () in sizes:
        raise ValueError(
            "got weights that are not stacked along one leading axis, need [L, N, K]; take nothing from a single matrix"
        )
    ((length,),) = sizes
    if not isinstance(index, jax.core.Tracer) and not 0 <= int(index) < length:
        raise ValueError(f"got the index {int(index)} of a stack of {length}; pass one from 0 to {length - 1}")
    return jnp.asarray(index, jnp.int32)


def _within(outer: Slice, index: jax.Array) -> Slice:
    """One matrix of a slice that is itself a stack: the two leading axes become one, which moves no data."""
    layers, inner = outer.stack.shape[:2]
    flat = jax.tree.map(lambda a: a.reshape(layers * inner, *a.shape[2:]), outer.stack)
    return Slice(flat, jnp.clip(outer.index, 0, layers - 1) * inner + jnp.clip(index, 0, inner - 1))


def _indexed(tree: Any, index: jax.Array) -> Any:
    at = jnp.maximum(index, 0)
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, at, keepdims=False), tree)


_TAKEN: dict[type, Callable[[Any, jax.Array], Any]] = {QuantizedTensor: Slice, Slice: _within}


@dequantize.register
def _(w: Slice, dtype=jnp.float32) -> jax.Array:
    return dequantize(w.matrix(), dtype)


@take_rows.register
def _(w: Slice, rows):
    return take_rows(w.matrix(), rows)
