"""A block as a function of its contents, without the arrays of any one block: blocks of one structure share it."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from any4_jax.walk.capture import positions_of
from any4_jax.walk.records import Contents, contents_of, with_contents


@dataclasses.dataclass(frozen=True)
class Shapes:
    """A tree of arrays without their values, which can be hashed."""

    treedef: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, tree: Any) -> Self:
        leaves, treedef = jax.tree.flatten(tree)
        return cls(treedef, tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves))

    def tree(self) -> Any:
        return jax.tree.unflatten(self.treedef, self.leaves)


@dataclasses.dataclass(frozen=True)
class BlockProgram:
    """(contents, inputs [B, T, E]) -> outputs [B, T, E] of a block with these contents.

    Equal for blocks of one structure: a static argument of jit.

    Attributes:
      block: `Decoder.block` of the model.
      graphdef, state: `nnx.split` of the block, the state by its shapes.
      cache: an empty one for B rows and T slots, likewise.
    """

    block: Callable[..., Any]
    graphdef: Any
    state: Shapes
    cache: Shapes

    @classmethod
    def of(cls, block: Callable[..., Any], module: nnx.Module, cache: Any) -> Self:
        graphdef, state = nnx.split(module)
        return cls(block, graphdef, Shapes.of(state), Shapes.of(cache))

    def __call__(self, contents: Contents, x: jax.Array) -> jax.Array:
        module = nnx.merge(self.graphdef, self.state.tree())
        module = with_contents(module, contents_of(module), contents)
        empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.cache.tree())
        y, _ = self.block(*nnx.split(module), x, empty, positions_of(x), None)
        return y
