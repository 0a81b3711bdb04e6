"""Trees split into what is trained and what is not."""

from typing import Any

import jax
import jax.numpy as jnp


def partition(tree, mask=None) -> tuple[Any, Any]:
    """Splits a tree into (chosen, rest). Both have the tree's structure, with None where the other has the array.

    Without a mask, the floating-point leaves are chosen: lut, scales, offsets, low-rank factors, input scales and dense
    weights, which gradients and optimisers may see. The rest are the integers, which they never see: codes, tables of
    int8, e8m0 exponents and permutations.

    Args:
      tree: arrays, in operators or not.
      mask: bools in the structure of `tree`, True for a leaf that is chosen; any4_jax.trainable makes such masks.

    Raises:
      ValueError: the mask has another structure; the message is jax's, and says where.
    """
    if mask is None:
        mask = jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact), tree)
    chosen = jax.tree.map(lambda leaf, choose: leaf if choose else None, tree, mask)
    rest = jax.tree.map(lambda leaf, choose: None if choose else leaf, tree, mask)
    return chosen, rest


def combine(chosen, rest):
    """The inverse of `partition`."""
    return jax.tree.map(lambda c, r: r if c is None else c, chosen, rest, is_leaf=lambda node: node is None)
