"""One layer or expert of stacked weights, as an operator that the kernels read where it lies."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax import weights
from any4_jax.weights import QuantizedTensor


@dataclasses.dataclass(frozen=True)
class Layer:
    """W = stack[index]: one matrix of a leaf with a leading axis.

    Attributes:
      stack: [L, N, K], or with more axes between them, of which `layer` takes one after the other.
      index: int32 []; outside of 0 to L - 1 it stands for the nearest.
    """

    stack: QuantizedTensor
    index: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K), after the axes between."""
        return self.stack.shape[1:]

    def take(self) -> QuantizedTensor:
        """The matrix by itself, a copy where it is not fused into what reads it."""
        return _take(self.stack, self.index)


jax.tree_util.register_dataclass(Layer, ["stack", "index"], [])


def layer(stacked: Any, index: jax.Array | int) -> Any:
    """One layer of weights that are stacked along their first axis, without copying the codes.

    In a loop, `matmul(x, layer(stacked, i))` gives what `lax.scan` over `stacked` gives; but scan cuts every layer's
    codes out of the stack into memory of their own, and a backend with `Backend.takes_layers` (cuda) reads them in
    place. The same goes for experts: `matmul_each(x, [layer(experts, i), layer(experts, j)])`.

    Args:
      stacked: an operator whose arrays all have a leading axis L, or any tree of such operators and arrays.
      index: an integer, or int32 [] that may be traced; outside of 0 to L - 1 it stands for the nearest.

    Returns:
      The same tree with a `Layer` in place of each QuantizedTensor; other arrays are indexed. Layers can be indexed
      again: `layer(layer(w, i), j)` is expert j of layer i where w has the axes L, E, N, K.
    """
    at = jnp.asarray(index, jnp.int32)

    def one(node: Any) -> Any:
        if isinstance(node, Layer):
            return _within(node, at)
        return Layer(node, at) if isinstance(node, QuantizedTensor) else _take(node, at)

    return jax.tree.map(one, stacked, is_leaf=lambda node: isinstance(node, QuantizedTensor | Layer))


def _within(outer: Layer, index: jax.Array) -> Layer:
    """One matrix of a layer that is a stack itself: the two axes become one, which moves nothing."""
    layers, inner = outer.stack.shape[:2]
    flat = jax.tree.map(lambda a: a.reshape(layers * inner, *a.shape[2:]), outer.stack)
    return Layer(flat, jnp.clip(outer.index, 0, layers - 1) * inner + jnp.clip(index, 0, inner - 1))


def _take(tree: Any, index: jax.Array) -> Any:
    at = jnp.maximum(index, 0)
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, at, keepdims=False), tree)


@weights.dequantize.register
def _(w: Layer, dtype=jnp.float32) -> jax.Array:
    return weights.dequantize(w.take(), dtype)
