"""Linen: pairs (module, variables), and Hugging Face's Flax models, which hold such a pair.

The operator takes the kernel's place in the parameters, and the module is wrapped so that its Dense layers know what
to do with one (any4_jax.nn.swapping).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax
import jax
from flax import linen
from flax.core import meta

from any4_jax.matmul import is_quantized
from any4_jax.methods.matrices import Matrix
from any4_jax.models import hf_flax
from any4_jax.nn.linen import boxed
from any4_jax.nn.swapping import Intercepted, dense_layers, intercepted, quantized_dense
from any4_jax.surgery import trees
from any4_jax.surgery.rules import Recipe

Pair = tuple[linen.Module | Intercepted, Mapping[str, Any]]


def is_pair(model: Any) -> bool:
    """Whether `model` is (Linen module, its parameters or variables)."""
    return isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], linen.Module | Intercepted)


def pair_matrices(model: Pair, inputs: Any = None) -> dict[str, Matrix]:
    """The kernels of the Dense layers by the dotted path of their layer.

    With `inputs`, a tuple of the arguments of `apply` (or a dict of them by name; shapes are enough), the layers are
    those that run as Dense, stacks under nn.scan among them. Without, every two-dimensional "kernel" is taken for one.
    """
    module, variables = model
    if inputs is None:
        found = trees.matrices(params_of(variables)).items()
        return {_layer(path): _unboxed(matrix) for path, matrix in found if trees.is_kernel(path)}
    arguments, named = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})

    def run(variables, arguments, named):
        return module.apply(variables, *arguments, **named, mutable=True)

    whole = variables if "params" in variables else {"params": variables}
    layers = dense_layers(lambda: jax.eval_shape(run, meta.unbox(whole), arguments, named))
    return _kernels(params_of(variables), {layer_path(path): transposed for path, transposed in layers.items()})


def pair_operators(model: Pair) -> dict[str, Any]:
    """The operators of a pair by the dotted path of their layer."""
    return _operators(params_of(model[1]))


def pair_replace(model: Pair, done: Mapping[str, Any], recipe: Recipe | None) -> Pair:
    """The wrapped module, and variables with operators in the place of kernels."""
    module, variables = model
    params = _with_kernels(params_of(variables), done)
    swapped = intercepted(module, quantized_dense)
    swapped = dataclasses.replace(swapped, recipe=recipe or swapped.recipe)
    return swapped, {**variables, "params": params} if "params" in variables else params


def hf_matrices(model: Any, inputs: Any = None) -> dict[str, Matrix]:
    """The kernels of the Dense layers of a Hugging Face Flax model, found by tracing it."""
    return _kernels(model.params, hf_flax.dense_paths(model))


def hf_operators(model: Any) -> dict[str, Any]:
    """The operators of a Hugging Face Flax model by the dotted path of their layer."""
    return _operators(model.params)


def hf_replace(model: Any, done: Mapping[str, Any], recipe: Recipe | None) -> Any:
    """A model of the same class with operators in the place of kernels."""
    new = hf_flax.with_params(model, _with_kernels(model.params, done))
    new.recipe = recipe or getattr(model, "recipe", None)
    return new


def pair_contents(model: Pair) -> dict[str, Any]:
    """The variables of a pair, as they were passed, without boxes."""
    return trees.contents(_unfrozen(model[1] or {}))


def pair_fill(model: Pair, given: Mapping[str, Any], recipe: Recipe | None) -> Pair:
    """The pair with other contents, boxed where its own are. Its variables may be abstract, or None for whatever is
    given; the module is wrapped if an operator is among them."""
    module, variables = model
    if variables is None:
        filled = dict(given)
    else:
        filled = trees.fill(_unfrozen(variables), given, turned=lambda path: True if trees.is_kernel(path) else None)
    if not isinstance(module, Intercepted) and not trees.operators(filled):
        return module, filled
    return dataclasses.replace(intercepted(module, quantized_dense), recipe=recipe), filled


def hf_contents(model: Any) -> dict[str, Any]:
    """The parameters of a Hugging Face Flax model."""
    return trees.contents(_unfrozen(_with_shapes(model).params))


def hf_fill(model: Any, given: Mapping[str, Any], recipe: Recipe | None) -> Any:
    """A model of the same class with other contents. Where it is abstract the dtypes are those given: transformers
    says float32 of every parameter that it has not made."""
    held = _with_shapes(model)
    dense = hf_flax.dense_paths(held)
    params = _unfrozen(held.params)
    filled = trees.fill(params, given, turned=lambda path: dense.get(_layer(path)), declared=False)
    new = hf_flax.with_params(held, filled)
    new.recipe = recipe
    return new


def _with_shapes(model: Any) -> Any:
    """A model that has parameters: one made with _do_init=False has the shapes alone, and refuses to show them."""
    return model if model._is_initialized else hf_flax.with_params(model, model.params_shape_tree)


def _unfrozen(variables: Any) -> dict[str, Any]:
    """As dicts that may be changed."""
    return flax.core.unfreeze(variables)


def params_of(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters, be they given alone or among other collections."""
    return variables.get("params", variables)


def layer_path(path: tuple[str, ...]) -> str:
    """What a Dense layer is called that is at a path in a module. One that is the whole module has no path, and is
    called by its kernel."""
    return ".".join(path) or "kernel"


def _key(layer: str) -> str:
    """The path of a layer's kernel in the parameters."""
    return layer if layer == "kernel" else f"{layer}.kernel"


def _layer(key: str) -> str:
    return key.removesuffix(".kernel")


def _kernels(params: Mapping[str, Any], layers: Mapping[str, bool]) -> dict[str, Matrix]:
    here = trees.leaves(params)
    found = {path: Matrix(here[_key(path)], turned) for path, turned in layers.items() if _key(path) in here}
    return {path: _unboxed(m) for path, m in found.items() if not is_quantized(m.array)}


def _unboxed(matrix: Matrix) -> Matrix:
    return Matrix(meta.unbox(matrix.array), matrix.transposed)


def _operators(params: Mapping[str, Any]) -> dict[str, Any]:
    found = trees.operators(params).items()
    return {_layer(path): meta.unbox(operator) for path, operator in found}


def _with_kernels(params: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with operators as kernels, their arrays boxed where the kernels were."""
    plain = _unfrozen(params)
    here = trees.leaves(plain)
    new = {}
    for path, operator in done.items():
        box = trees.box_of(here[_key(path)])
        new[_key(path)] = operator if box is None else boxed(operator, box)
    return trees.replace(plain, new)
