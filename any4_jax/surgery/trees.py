"""Plain trees of arrays: a matrix named "kernel" is [K, N] as Flax keeps it, one named "weight" is [N, K] as torch
does. Other leaves, vectors and stacks are no layers."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax.core import meta

from any4_jax.matmul import is_quantized, unprepare
from any4_jax.methods.matrices import Matrix
from any4_jax.nn.linen import boxed
from any4_jax.surgery import fitting
from any4_jax.surgery.rules import Recipe

_TRANSPOSED = {"kernel": True, "weight": False}


def dotted(path: tuple) -> str:
    """A path of a tree or an NNX module as text."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def is_leaf(node: Any) -> bool:
    """Whether surgery looks at a node as a whole: operators, and Flax's boxes around an array."""
    return is_quantized(node) or isinstance(node, meta.AxisMetadata)


def leaves(tree: Any) -> dict[str, Any]:
    """Arrays, operators and boxes of a tree by dotted path."""
    return {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def operators(tree: Any) -> dict[str, Any]:
    """The operators of a tree by dotted path."""
    return {path: leaf for path, leaf in leaves(tree).items() if is_quantized(leaf)}


def matrices(tree: Any) -> dict[str, Matrix]:
    """The float matrices that can be quantized, by dotted path."""
    found = {}
    for path, leaf in leaves(tree).items():
        name, array = path.rsplit(".", 1)[-1], meta.unbox(leaf)
        if name in _TRANSPOSED and not is_quantized(leaf) and getattr(array, "ndim", 0) == 2:
            found[path] = Matrix(array, _TRANSPOSED[name])
    return found


def replace(tree: Any, done: Mapping[str, Any], recipe: Recipe | None = None) -> Any:
    """The tree with operators in the place of the leaves at the paths of `done`. It has no place for a recipe."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: done.get(dotted(path), leaf), tree, is_leaf=is_leaf)


def contents(tree: Any) -> Any:
    """The tree without boxes around its arrays, its operators as they are saved."""
    return unprepare(meta.unbox(tree))


def is_kernel(path: str) -> bool:
    """Whether the last name of a dotted path is that of a matrix that is kept as [K, N]."""
    return path.rsplit(".", 1)[-1] == "kernel"


def fill(
    tree: Any,
    given: Any,
    recipe: Recipe | None = None,
    *,
    turned: Callable[[str], bool | None] = is_kernel,
    declared: bool = True,
) -> Any:
    """The tree with the arrays and operators of `given` for its own, boxed where its own are. It has no place for a
    recipe. For what is refused, and the last two arguments, see `fitting.check`."""
    new = leaves(given)
    fitting.check(leaves(tree), new, turned, declared=declared)

    def put(path, leaf):
        mine, box = new[dotted(path)], box_of(leaf)
        if box is None:
            return mine
        return boxed(mine, box) if is_quantized(mine) else box.replace_boxed(mine)

    return jax.tree_util.tree_map_with_path(put, tree, is_leaf=is_leaf)


def box_of(kernel: Any) -> meta.AxisMetadata | None:
    """The box of an array, or the one that the boxes in an operator were made from."""
    if isinstance(kernel, meta.AxisMetadata):
        return kernel
    boxes = jax.tree.leaves(kernel, is_leaf=lambda node: isinstance(node, meta.Partitioned))
    if not boxes or not isinstance(boxes[0], meta.Partitioned):
        return None
    *stack, n, k = boxes[0].names  # of the codes, which come first in every operator
    return boxes[0].replace(names=(*stack, k, n))
