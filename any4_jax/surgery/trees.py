"""Plain trees of arrays: a matrix named "kernel" is [K, N] as in Flax, one named "weight" is [N, K] as in torch.

Other leaves, vectors and stacks are not layers.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen
from flax.core import meta

from any4_jax.methods.matrices import Matrix
from any4_jax.nn.axes import kernel_axes, own_axes
from any4_jax.nn.linen import boxed
from any4_jax.surgery import fitting
from any4_jax.surgery.declarations import Declared, layout_of
from any4_jax.surgery.rules import Recipe, declared_for
from any4_jax.weights import Contraction, contraction, is_operator

_TRANSPOSED = {"kernel": True, "weight": False}


def dotted(path: tuple) -> str:
    """The path of a leaf of a tree or of an NNX module, as text."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def is_leaf(node: Any) -> bool:
    """Whether surgery takes a node as a whole: an operator, or a box of Flax around an array."""
    return is_operator(node) or isinstance(node, meta.AxisMetadata)


def leaves(tree: Any) -> dict[str, Any]:
    """The arrays, operators and boxes of a tree, by dotted path."""
    return {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def operators(tree: Any) -> dict[str, Any]:
    """The operators of a tree, by dotted path; a kernel of any rank as its matrix."""
    found = {path: leaf for path, leaf in leaves(tree).items() if is_operator(leaf)}
    return {path: leaf.matrix if isinstance(leaf, Contraction) else leaf for path, leaf in found.items()}


def as_before(leaf: Any, given: Any) -> Any:
    """What takes the place of a leaf: an operator for a kernel of any rank stands for such a kernel again."""
    before = meta.unbox(leaf)
    if isinstance(before, Contraction) and is_operator(given) and not isinstance(given, Contraction):
        return contraction(given, before.layout)
    return given


def matrices(tree: Any, declared: Declared = ()) -> dict[str, Matrix]:
    """The float matrices that can be quantized, by dotted path.

    Args:
      tree: of arrays.
      declared: regexes of paths, and what is declared of the arrays there.
    """
    if not declared:
        _refuse_code(tree)
    found = {}
    here = leaves(tree)
    for path, leaf in here.items():
        name, array = path.rsplit(".", 1)[-1], meta.unbox(leaf)
        if name in _TRANSPOSED and not is_operator(leaf) and getattr(array, "ndim", 0) == 2:
            found[path] = Matrix(array, _TRANSPOSED[name], special=_turned(path, here, _TRANSPOSED[name]))
    arrays = {path: meta.unbox(leaf) for path, leaf in here.items() if not is_operator(leaf)}
    for path, declaration in declared_for(arrays, declared).items():
        found[path] = Matrix(arrays[path], False, layout=layout_of(path, declaration, arrays[path]))
    return found


def _refuse_code(tree: Any) -> None:
    """Raises TypeError for a model of another library: its own code would meet operators in place of arrays."""
    nodes = [tree, *jax.tree.leaves(tree, is_leaf=_is_foreign)]
    foreign = next((node for node in nodes if _is_foreign(node)), None)
    if isinstance(foreign, linen.Module):
        raise TypeError(
            f"got the Linen module {type(foreign).__name__} without its parameters; pass the pair (module, variables)"
        )
    if foreign is not None:
        own = type(foreign)
        packages = {base.__module__.partition(".")[0] for base in own.__mro__}
        kind = next((words for name, words in _LIBRARIES.items() if name in packages), "a class of its own")
        raise TypeError(
            f"got a {own.__name__}, {kind}, whose code knows no operators; pass a nested dict of its arrays, or "
            "declare kernels by rules such as (r'.*weight', method, any4_jax.Axes('NK')) and multiply by "
            "any4_jax.matmul"
        )


_LIBRARIES = {"equinox": "an Equinox module", "keras": "a Keras model", "haiku": "a Haiku transform"}


def _is_foreign(node: Any) -> bool:
    """Whether a node is an object with code of its own, such as a module of another library."""
    if node is None or isinstance(node, Mapping | list | tuple | str | bytes | complex | float | int) or is_leaf(node):
        return False
    return not hasattr(node, "shape")


def _turned(path: str, here: Mapping[str, Any], transposed: bool) -> str | None:
    """Why a matrix is not what its name says: its bias is as long as the other axis. None if nothing tells so."""
    parent, _, name = path.rpartition(".")
    shape, bias = np.shape(meta.unbox(here[path])), here.get(f"{parent}.bias".lstrip("."))
    size = np.shape(meta.unbox(bias))[-1:] if bias is not None else ()
    if size and shape[-1 if transposed else 0] != size[0] == shape[0 if transposed else -1]:
        told, meant = ("NK", "[K, N]") if transposed else ("KN", "[N, K]")
        return (
            f"a {name!r} {list(shape)} is read as {meant}, and its bias has {size[0]} entries; declare Axes({told!r})"
        )
    return None


def replace(tree: Any, done: Mapping[str, Any], recipe: Recipe | None = None) -> Any:
    """The tree with the operators of `done` in place of the leaves at their paths. A tree can't hold a recipe."""

    def put(path, leaf):
        return as_before(leaf, done[dotted(path)]) if dotted(path) in done else leaf

    return jax.tree_util.tree_map_with_path(put, tree, is_leaf=is_leaf)


def contents(tree: Any) -> Any:
    """The tree without boxes around its arrays."""
    return meta.unbox(tree)


def is_kernel(path: str) -> bool:
    """Whether the last name of a dotted path is "kernel", the name of a matrix [K, N]."""
    return path.rsplit(".", 1)[-1] == "kernel"


def fill(
    tree: Any,
    given: Any,
    recipe: Recipe | None = None,
    *,
    turned: Callable[[str], bool | None] = is_kernel,
    declared: bool = True,
) -> Any:
    """The tree with the arrays and operators of `given`, boxed wherever its own are. A tree can't hold a recipe.

    Raises ValueError if `given` doesn't fit; `fitting.check` says when, and what the last two arguments mean.
    """
    new = leaves(given)
    fitting.check(leaves(tree), new, turned, declared=declared)

    def put(path, leaf):
        mine, box = new[dotted(path)], box_of(leaf)
        if box is None:
            return mine
        return boxed(mine, box) if is_operator(mine) else box.replace_boxed(mine)

    return jax.tree_util.tree_map_with_path(put, tree, is_leaf=is_leaf)


def box_of(kernel: Any) -> meta.AxisMetadata | None:
    """The box of an array, or the box from which the boxes in an operator were made."""
    if isinstance(kernel, meta.AxisMetadata):
        return kernel
    boxes = jax.tree.leaves(kernel, is_leaf=lambda node: isinstance(node, meta.Partitioned))
    if not boxes or not isinstance(boxes[0], meta.Partitioned):
        return None
    names = kernel_axes(kernel)
    if isinstance(kernel, Contraction):
        names = own_axes(names, meta.unbox(kernel).layout.roles)
    return boxes[0].replace(names=names)
