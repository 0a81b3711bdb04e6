"""Quantized kernels of any rank among the variables of a function: they are read where its products read them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax.core import meta

from any4_jax.nn.interpret import Reader, evaluate, plain, trace
from any4_jax.nn.stored import Stored, stored
from any4_jax.weights import Contraction, Layout


def with_kernels(function: Callable[[Any], Any], variables: Any) -> Any:
    """function(variables), a function of JAX, in which kernels of any rank are read as they are stored.

    Args:
      function: called with a float array in the place of each Contraction.
      variables: any tree.
    """
    found, structure = jax.tree_util.tree_flatten_with_path(variables, is_leaf=_is_kernel)
    paths, leaves = [path for path, _ in found], [leaf for _, leaf in found]
    at = [i for i, leaf in enumerate(leaves) if _is_kernel(leaf)]
    if not at:
        return function(variables)
    kernels = [meta.unbox(leaves[i]) for i in at]

    def run(floats: list[jax.Array], rest: list[Any]) -> Any:
        whole = iter(floats)
        return function(
            jax.tree.unflatten(structure, [next(whole) if i in at else leaf for i, leaf in enumerate(rest)])
        )

    rest = [None if i in at else leaf for i, leaf in enumerate(leaves)]
    names = [jax.tree_util.keystr(paths[i], simple=True, separator=".") for i in at]
    inputs = [stored(name, kernel.matrix, kernel.layout) for name, kernel in zip(names, kernels, strict=True)]
    return _read(run, inputs, rest, Reader())


def watched(
    function: Callable[..., Any], kernels: Mapping[str, tuple[jax.Array, Layout]], reader: Reader, *rest: Any
) -> Any:
    """function(float kernels by path, *rest), of whose products a reader learns."""
    paths = list(kernels)
    inputs = [stored(path, *kernels[path]) for path in paths]
    return _read(
        lambda floats, rest: function(dict(zip(paths, floats, strict=True)), *rest), inputs, list(rest), reader
    )


def _read(run: Callable[..., Any], inputs: list[Stored], rest: list[Any], reader: Reader) -> Any:
    floats = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in inputs]
    program, arrays, result = trace(run, floats, rest)
    return result(list(map(plain, evaluate(program, [*inputs, *arrays[len(inputs) :]], reader))))


def _is_kernel(node: Any) -> bool:
    return isinstance(node, Contraction)
