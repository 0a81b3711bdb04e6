"""Training over quantized weights: which arrays an optimiser may see, and low-rank updates on top (LoRA)."""

import math
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from any4_jax.surgery import map_operators, quantized_leaves
from any4_jax.weights import LowRank, Sum, Trained, is_operator, places

_NOTHING = {
    "floats": "no floating-point leaf; pass a tree of weights",
    "tables": "no table, scale or offset of a quantized weight; quantize it first",
    "lora": "no low-rank update; call add_lora first",
}


def trainable(tree: Any, what: Literal["floats", "tables", "lora"] = "floats") -> Any:
    """Marks what to train, in a tree of bools: a mask for `any4_jax.partition` and for optax.

    Three things are never marked: integers (codes, tables of int8, e8m0 exponents, permutations); arrays that an
    operator registered as constants, such as the scale of a LowRank; and the table of a uniform leaf (integer formats),
    because products may rely on its being a ramp.

    Args:
      tree: arrays, in operators or not: the params of a Linen or Hugging Face model, or one operator.
      what: "floats" marks all other floating-point leaves. "tables" and "lora" mark the arrays that operators
        registered as such, wherever they are: the lut, scales and offsets of each QuantizedTensor, and the a and b of
        each LowRank.

    Returns:
      The structure of `tree`, with True or False for each leaf.

    Raises:
      ValueError: `what` is another name, or the tree has no such leaf.
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
    """The model with low-rank updates: each quantized linear's operator q becomes Sum((q, LowRank(a, b, scale))).

    The new model computes what the old one did, since b starts at zero (LoRA, arXiv 2106.09685, section 4.1). The
    entries of a are drawn from N(0, 1/K): normal as in the paper, with the variance that makes a x as large as x for
    every K, so that one learning rate suits linears of all widths.

    Args:
      model: any model that `quantize_model` returns.
      rank: R >= 1.
      alpha: the update is scaled by alpha / rank; None means alpha = rank, a scale of 1.
      seed: for the random numbers. Those of a linear depend on the seed and the linear's path, not on other linears.
      pattern: regex that the whole path of a linear must match for it to get an update.
      dtype: of a and b. float32 keeps the small steps of an optimiser; products still run in the dtype of x.

    Returns:
      A new model of the same kind, over the same quantized arrays.

    Raises:
      TypeError: rank is no int.
      ValueError: rank is below 1, alpha is not positive and finite, the model has no quantized linear, the pattern
        matches none, or a linear already has a low-rank update.
    """
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer):
        raise TypeError(f"got rank={rank!r}, a low-rank update needs a whole number; pass an int")
    if rank < 1:
        raise ValueError(f"got rank={rank}, a low-rank update needs at least 1; pass a larger rank")
    alpha = float(rank) if alpha is None else float(alpha)
    if not 0 < alpha < math.inf:
        raise ValueError(f"got alpha={alpha}, need a positive finite number; pass one, or None for alpha = rank")
    if not quantized_leaves(model):
        raise ValueError("got a model without quantized layers, which add_lora needs; quantize it first")

    def with_update(path: str, operator: Any) -> Sum:
        if any(place.trained == "lora" for place, _ in places(operator)):
            raise ValueError(f"{path} already has a low-rank update; train it, or pass a pattern that leaves it out")
        *stack, n, k = operator.shape
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        a = (jax.random.normal(key, (*stack, rank, k)) * k**-0.5).astype(dtype)
        b = jnp.zeros((*stack, n, rank), dtype)
        return Sum((operator, LowRank(a, b, jnp.full(stack, alpha / rank, jnp.float32))))

    return map_operators(model, with_update, pattern)
