"""Training over quantized weights: which arrays an optimiser may see, and low-rank updates on top (LoRA)."""

import math
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from any4_jax.surgery import map_operators, quantized_leaves
from any4_jax.weights import LowRank, Sum, Trained, is_operator, places

_NOTHING = {
    "floats": "no floating-point leaf; pass a tree of weights",
    "tables": "no table, scale or offset of a quantized weight; quantize it first",
    "lora": "no low-rank update; call add_lora first",
}


def trainable(tree: Any, what: Literal["floats", "tables", "lora"] = "floats") -> Any:
    """The tree of bools that marks what is to be trained: a mask for `any4_jax.partition` and for optax.

    What is no parameter is never marked: integers (codes, e8m0 exponents, permutations) and what an operator was
    registered with as a constant, such as the scale of a LowRank, and the table of a uniform leaf (integer formats),
    which products may take for the ramp that it is.

    Args:
      tree: arrays, in operators or not: the params of a Linen or Hugging Face model, or one operator.
      what: "floats" marks all other floating-point leaves; "tables" and "lora" the arrays that
        operators were registered with as such, wherever they are: the lut, scales and offsets of each
        QuantizedTensor, and the a and b of each LowRank.

    Returns:
      True or False in the place of each leaf of `tree`.

    Raises:
      ValueError: another name, or a tree that has no such leaf.
    """
    if what not in _NOTHING:
        known = ", ".join(repr(name) for name in _NOTHING)
        raise ValueError(f"got what={what!r}, which names no part of a tree; pass one of {known}")

    def mark(node: Any) -> Any:
        if not is_operator(node):
            return what == "floats" and _is_floating(node)
        marks = [_is_floating(leaf) and _is_meant(place.trained, what) for place, leaf in places(node)]
        return jax.tree.unflatten(jax.tree.structure(node), marks)

    marks = jax.tree.map(mark, tree, is_leaf=is_operator)
    if not any(jax.tree.leaves(marks)):
        raise ValueError(f"got a tree in which {what!r} marks nothing: it has {_NOTHING[what]}")
    return marks


def _is_meant(trained: Trained, what: str) -> bool:
    return trained == what or (what == "floats" and trained is not None)


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def add_lora(
    model: Any,
    rank: int,
    *,
    alpha: float | None = None,
    seed: int = 0,
    pattern: str = r".*",
    dtype: DTypeLike = jnp.float32,
) -> Any:
    """The model with low-rank updates: each quantized layer's operator q becomes Sum((q, LowRank(a, b, scale))).

    It computes what it did before, since b starts at zero (LoRA, arXiv 2106.09685, section 4.1). The entries of a are
    drawn from N(0, 1/K): normal as in the paper, and of the variance that makes a x as large as x for every K, so that
    one learning rate suits layers of all widths.

    Args:
      model: any model that `quantize_model` gives.
      rank: R >= 1.
      alpha: the update is scaled by alpha / rank; None means rank, a scale of 1.
      seed: of the random numbers; a layer's follow from it and from the layer's path, not from the other layers.
      pattern: regex of the whole paths of the layers meant.
      dtype: of a and b. float32 keeps an optimiser's small steps, and products run in the dtype of x all the same.

    Returns:
      A new model of the same kind, over the same quantized arrays.

    Raises:
      ValueError: a rank below 1, an alpha that is not positive and finite, no quantized layer, a pattern that matches
        none, or a layer with a low-rank update already.
    """
    if rank < 1:
        raise ValueError(f"got rank={rank}, a low-rank update needs at least 1; pass a larger rank")
    alpha = float(rank) if alpha is None else float(alpha)
    if not 0 < alpha < math.inf:
        raise ValueError(f"got alpha={alpha}, need a positive finite number; pass one, or None for alpha = rank")
    if not quantized_leaves(model):
        raise ValueError("got a model without quantized layers, add_lora puts updates over these; quantize it first")

    def with_update(path: str, operator: Any) -> Sum:
        if any(place.trained == "lora" for place, _ in places(operator)):
            raise ValueError(f"{path} has a low-rank update already, add_lora gives one; train it, or pass a pattern")
        *stack, n, k = operator.shape
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        a = (jax.random.normal(key, (*stack, rank, k)) * k**-0.5).astype(dtype)
        b = jnp.zeros((*stack, n, rank), dtype)
        return Sum((operator, LowRank(a, b, jnp.full(stack, alpha / rank, jnp.float32))))

    return map_operators(model, with_update, pattern)
