"""NNX modules: any nnx.Linear can become an Any4Linear, any nnx.Embed an Any4Embed, any other kernel an Any4Kernel.

The original module stays as it was; new modules share its arrays.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import unflatten_dict

from any4_jax.methods.matrices import Matrix
from any4_jax.models.fold import module_at
from any4_jax.nn.kernel import Any4Kernel
from any4_jax.nn.nnx import Any4Embed, Any4Linear
from any4_jax.nn.operator_variables import Quantized
from any4_jax.nn.plain import is_layer, rewritten, why_not_plain
from any4_jax.surgery import fitting, nnx_kernels, trees
from any4_jax.surgery.declarations import Declared
from any4_jax.surgery.rules import Recipe
from any4_jax.surgery.trees import dotted
from any4_jax.weights import is_operator


def linears(model: nnx.Module) -> dict[str, nnx.Linear]:
    """The dense layers of an NNX module, by dotted path."""
    layers = ((dotted(path), node) for path, node in nnx.iter_modules(model) if is_layer(node))
    return {path: node for path, node in layers if isinstance(node, nnx.Linear)}


def holders(model: nnx.Module) -> dict[str, Any]:
    """The modules that hold a matrix which is quantized or can be, by dotted path."""
    found = {dotted(path): node for path, node in nnx.iter_modules(model) if _holds_matrix(node)}
    kernels = nnx_kernels.held(model)
    own = {dotted((*path, attribute)) for (path, attribute), _ in kernels.values()}
    # Layers that share their matrix are one, as they are in the module's state.
    first = {id(matrix_variable(node)): path for path, node in reversed(found.items())}
    whole = {path: node for path, node in found.items() if path not in own and first[id(matrix_variable(node))] == path}
    return whole | {name: kernel for name, (_, kernel) in kernels.items()}


def _holds_matrix(module: Any) -> bool:
    return isinstance(module, Quantized) or is_layer(module)


def matrix_variable(layer: Any) -> Any:
    """What holds the matrix of a layer: its variable, or the variables of an operator."""
    if isinstance(layer, Quantized):
        return layer.arrays
    return layer.embedding if isinstance(layer, nnx.Embed) else layer.kernel


def matrix_of(layer: nnx.Linear | nnx.Embed) -> Matrix:
    """The float weight of a layer."""
    special = why_not_plain(layer)
    if isinstance(layer, nnx.Embed):
        return Matrix(layer.embedding.get_value(), transposed=False, by_name=True, special=special)
    return Matrix(layer.kernel.get_value(), transposed=True, special=special)


def matrices(model: nnx.Module, inputs: Any = None, declared: Declared = ()) -> dict[str, Matrix]:
    """The float weights of dense layers, embeddings and einsums, by dotted path.

    Args:
      model: the module.
      inputs: example arguments of its call, with which kernels are found that no class of layers tells of.
      declared: regexes of paths, and what is declared of the kernels there.
    """
    layers = {path: layer for path, layer in holders(model).items() if not isinstance(layer, Quantized)}
    found = {path: matrix_of(layer) for path, layer in layers.items()}
    found |= nnx_kernels.matrices(model, inputs, declared)
    elsewhere = nnx_kernels.shared(model, {path: matrix_variable(layer) for path, layer in layers.items()})
    found = {path: dataclasses.replace(m, special=m.special or elsewhere.get(path)) for path, m in found.items()}
    wrapped = {dotted(path): reason for path, reason in rewritten(model).items()}
    return found | {path: dataclasses.replace(found[path], special=wrapped[path]) for path in found if path in wrapped}


def operators(model: nnx.Module) -> dict[str, Any]:
    """The operators of the quantized layers, by dotted path."""
    return {path: layer.weight for path, layer in holders(model).items() if isinstance(layer, Quantized)}


def around(layer: Any, weight: Any) -> Any:
    """A layer that computes what this one does, with the operator `weight` [*L, N, K] as its matrix.

    Raises:
      ValueError: no quantized layer computes what the layer does.
    """
    if isinstance(layer, Quantized):
        new: Any = copy_module(layer)
        new.weight = weight
        return new
    special = why_not_plain(layer)
    if special is not None:
        raise ValueError(f"got {special}, whose place a quantized layer can't take; pass a plain layer of flax")
    if isinstance(layer, nnx.Embed):
        return Any4Embed.of(weight, dtype=layer.dtype)
    bias, of_bias = (None, {}) if layer.bias is None else (layer.bias.get_value(), layer.bias.get_metadata())
    of_kernel = layer.kernel.get_metadata()
    return Any4Linear.of(weight, bias=bias, dtype=layer.dtype, kernel_metadata=of_kernel, bias_metadata=of_bias)


def replace(model: nnx.Module, done: Mapping[str, Any], recipe: Recipe | None) -> nnx.Module:
    """A new module in which the layers at the paths of `done` hold its operators. A layer that the module holds in
    several places is replaced in all of them."""

    layers = {path for path, layer in holders(model).items() if not isinstance(layer, Any4Kernel)}

    weights: dict[int, Any] = {}
    biases: dict[int, Any] = {}

    def swap(path, node):
        key = id(matrix_variable(node)) if _holds_matrix(node) else None
        operator = done.get(dotted(path)) if dotted(path) in layers else None
        if isinstance(node, Any4Kernel) or key is None or (operator is None and key not in weights):
            return node
        layer = around(node, weights[key].weight if operator is None else operator)
        # What layers share in the module, they share in the new one.
        layer.arrays = weights.setdefault(key, layer).arrays
        if getattr(node, "bias", None) is not None:
            layer.bias = biases.setdefault(id(node.bias), layer.bias)
        return layer

    new: Any = nnx.recursive_map(swap, copy_module(model))
    nnx_kernels.put(new, {path: operator for path, operator in done.items() if path not in layers})
    if recipe is not None:
        new.recipe = recipe
    return new


def contents(model: nnx.Module) -> dict[str, Any]:
    """The arrays and operators of a module, except the state of its random numbers (nnx.RngState)."""
    flat: dict[tuple, Any] = {tuple(map(str, path)): _value(v) for path, v in _variables(model)}
    kernels = nnx_kernels.held(model)
    for path, layer in holders(model).items():
        if isinstance(layer, Quantized) and path not in kernels:
            flat[*filter(None, path.split(".")), _name(layer)] = layer.weight
    for (owner, attribute), kernel in kernels.values():
        flat[*map(str, owner), attribute] = kernel.contraction
    return unflatten_dict(flat)


def _name(layer: Any) -> str:
    """The name that a layer's matrix has among its variables, or had before it was quantized."""
    return "embedding" if isinstance(layer, nnx.Embed | Any4Embed) else "kernel"


def fill(model: nnx.Module, given: Mapping[str, Any], recipe: Recipe | None, *, declared: bool = True) -> nnx.Module:
    """A new module with the contents `given`. They leave out the state of random numbers, which `model` provides.

    Raises ValueError if the contents don't fit; `fitting.check` says when, and what `declared` means.
    """
    wanted, new = trees.leaves(contents(model)), trees.leaves(given)
    held = {path: layer for path, layer in holders(model).items() if not isinstance(layer, Any4Kernel)}
    layers = {f"{path}.{_name(layer)}".lstrip("."): path for path, layer in held.items()}

    def turned(path: str) -> bool | None:
        return _name(held[layers[path]]) == "kernel" if path in layers else None

    fitting.check(wanted, new, turned, declared=declared)
    kernels = {dotted(at): name for name, at in nnx_kernels.places(model).items()}
    names = layers | kernels
    done = {names[path]: leaf for path, leaf in new.items() if is_operator(leaf)}
    for path, layer in names.items():
        if is_operator(wanted[path]) and layer not in done:
            raise ValueError(
                f"{layer} is quantized in the model, and the contents have a float kernel for it; pass a float model"
            )
    filled: Any = replace(model, done, recipe)
    if recipe is None and hasattr(filled, "recipe"):
        filled.recipe = None
    graphdef, state = nnx.split(filled)
    variables = dict(nnx.to_flat_state(state))
    for place, variable in _variables(filled):
        value = _at(place, _value(variable), new)
        variables[place] = variable.replace(value) if isinstance(variable, nnx.Variable) else value
    return nnx.merge(graphdef, nnx.from_flat_state(variables))


def _value(variable: Any) -> Any:
    """The value of a variable. A module may hold an array without one."""
    return variable.get_value() if isinstance(variable, nnx.Variable) else variable


def _at(path: tuple, value: Any, new: Mapping[str, Any]) -> Any:
    """The new value of the variable at a path. Most values are one array, at the variable's own path."""
    return jax.tree_util.tree_map_with_path(lambda inner, _: new[dotted((*path, *inner))], value)


def _variables(model: nnx.Module) -> Iterator[tuple[tuple, nnx.Variable]]:
    """The variables of a module, except those of operators and of random numbers."""
    quantized = {dotted(path) for path, node in nnx.iter_modules(model) if isinstance(node, Quantized)}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        of_operator = path[-2:-1] == ("arrays",) and dotted(path[:-2]) in quantized
        if not of_operator and not isinstance(variable, nnx.RngState):
            yield path, variable


def replace_module(model: nnx.Module, path: str, new: nnx.Module) -> None:
    """Replaces the submodule at a dotted path by `new`; changes `model`."""
    parent, _, last = path.rpartition(".")
    node = module_at(model, parent)
    if last.isdigit():
        node[int(last)] = new
    else:
        setattr(node, last, new)


def copy_module(model: nnx.Module) -> nnx.Module:
    """A copy of the module: its own variables over the same arrays."""
    return nnx.clone(model)
