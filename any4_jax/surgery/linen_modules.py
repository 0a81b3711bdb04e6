"""Linen: pairs (module, variables), and Hugging Face's Flax models, which hold such a pair.

The operator replaces the kernel in the parameters, and the module is wrapped so that its Dense layers can multiply by
an operator (any4_jax.nn.swapping).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax
from flax import linen
from flax.core import meta

from any4_jax.methods.matrices import Matrix
from any4_jax.models import hf_flax
from any4_jax.nn.linen import boxed
from any4_jax.nn.swapping import Intercepted, intercepted, layers_of, quantized_dense
from any4_jax.surgery import linen_kernels, tracing, trees
from any4_jax.surgery.declarations import Declared, layout_of
from any4_jax.surgery.rules import Recipe, declared_for
from any4_jax.weights import is_operator

Pair = tuple[linen.Module | Intercepted, Mapping[str, Any]]


def is_pair(model: Any) -> bool:
    """Whether `model` is (Linen module, its parameters or variables)."""
    return isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], linen.Module | Intercepted)


def pair_matrices(model: Pair, inputs: Any = None, declared: Declared = ()) -> dict[str, Matrix]:
    """The kernels of the Dense layers, by the dotted path of the layer.

    Args:
      model: the pair.
      inputs: a tuple of the arguments of `apply`, or a dict of them by name ("method" among them); shapes are enough.
        With it, the layers are those that run as Dense, including stacks under nn.scan, and all other kernels that
        products read. Without it, they are all that hold a two-dimensional "kernel", and those of more axes of which
        `linen_kernels` knows.
      declared: regexes of paths, and what is declared of the kernels there.
    """
    if not isinstance(model[1], Mapping):
        raise TypeError(
            f"got a Linen module with a {type(model[1]).__name__}, need its variables or their 'params'; pass the pair "
            "(module, variables)"
        )
    found = _declared(params_of(model[1]), declared)
    return {path: matrix for path, matrix in _pair_matrices(model, inputs).items() if path not in found} | found


def _pair_matrices(model: Pair, inputs: Any) -> dict[str, Matrix]:
    module, variables = model
    rewritten = _wrapped(variables)
    if inputs is None:
        two_axes = trees.matrices(params_of(variables)).items()
        found = {_layer(path): _unboxed(matrix) for path, matrix in two_axes if trees.is_kernel(path)}
        return _marked(found | _untraced(module, variables), rewritten)
    arguments, named = tracing.call_of(inputs)
    whole = meta.unbox(variables if "params" in variables else {"params": variables})

    def run(kernels: dict[str, Any], variables: Any, arguments: tuple, named: dict[str, Any]) -> Any:
        params = trees.replace(_unfrozen(variables["params"]), kernels)
        return module.apply({**variables, "params": params}, *arguments, **named, mutable=True)

    layers = layers_of(lambda: tracing.shapes(run, {}, whole, arguments, named))
    plain = {layer_path(path): turned for path, turned in layers.plain.items()}
    special = {layer_path(path): reason for path, reason in layers.special.items()}
    known = _kernels(params_of(variables), plain | dict.fromkeys(special, True))
    here = {path: leaf for path, leaf in trees.leaves(whole["params"]).items() if not is_operator(leaf)}
    # A stack of Dense kernels has its layers along any axis, as nn.scan was told.
    others = {
        path: leaf
        for path, leaf in here.items()
        if getattr(leaf, "ndim", 0) > (2 if _layer(path) in known else 1) and _layer(path) not in special
    }
    finding = tracing.find(run, others, whole, arguments, named)
    for path, says in tracing.layouts(finding, others).items():
        if isinstance(says, str):
            special[_layer(path)] = says
            known[_layer(path)] = Matrix(others[path], transposed=False)
        elif _layer(path) not in known or says.roles[-2:] != "KN":
            known[_layer(path)] = Matrix(others[path], False, by_name=path in finding.tables, layout=says)
    known |= {
        path: Matrix(here[key], False) for path in rewritten if path not in known and (key := _key(path, here)) in here
    }
    return _marked(known, special | rewritten)


def _untraced(module: Any, variables: Mapping[str, Any]) -> dict[str, Matrix]:
    """The kernels of other forms than a Dense layer's of which something is known without inputs."""
    inner = module.inner if isinstance(module, Intercepted) else module
    params = _unfrozen(params_of(variables))
    whole = {**_unfrozen(variables), "params": params} if "params" in variables else {"params": params}
    here = trees.leaves(params)
    found = linen_kernels.layouts(inner, whole, params).items()
    return {_layer(path): Matrix(meta.unbox(here[path]), False, layout=layout) for path, layout in found}


def pair_operators(model: Pair) -> dict[str, Any]:
    """The operators of a pair, by the dotted path of the layer."""
    return _operators(params_of(model[1]))


def pair_replace(model: Pair, done: Mapping[str, Any], recipe: Recipe | None) -> Pair:
    """The wrapped module, and its variables with operators in place of kernels."""
    module, variables = model
    params = with_kernels(params_of(variables), done)
    swapped = intercepted(module, quantized_dense)
    swapped = dataclasses.replace(swapped, recipe=recipe or swapped.recipe)
    return swapped, {**variables, "params": params} if "params" in variables else params


def hf_matrices(model: Any, inputs: Any = None, declared: Declared = ()) -> dict[str, Matrix]:
    """The kernels of the Dense layers of a Hugging Face Flax model, which are found by tracing it."""
    plain, special = hf_flax.layers_by_name(model)
    found = _marked(_kernels(model.params, plain | dict.fromkeys(special, True)), special)
    return found | _declared(model.params, declared)


def hf_operators(model: Any) -> dict[str, Any]:
    """The operators of a Hugging Face Flax model, by the dotted path of the layer."""
    return _operators(model.params)


def hf_replace(model: Any, done: Mapping[str, Any], recipe: Recipe | None) -> Any:
    """A model of the same class with operators in place of kernels."""
    new = hf_flax.with_params(model, with_kernels(model.params, done))
    new.recipe = recipe or getattr(model, "recipe", None)
    return new


def pair_contents(model: Pair) -> dict[str, Any]:
    """The variables of a pair as they were passed, but without boxes."""
    return trees.contents(_unfrozen(model[1] or {}))


def pair_fill(model: Pair, given: Mapping[str, Any], recipe: Recipe | None) -> Pair:
    """The pair with the contents `given`, boxed wherever its own contents are.

    The pair's variables may be abstract; None takes whatever is given. The module is wrapped if the new contents have
    an operator. Raises ValueError if they don't fit, as `fitting.check` says.
    """
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
    """A model of the same class with the contents `given`.

    Dtypes are compared only with real arrays: transformers says that every abstract parameter is float32. Raises
    ValueError if the contents don't fit, as `fitting.check` says.
    """
    held = _with_shapes(model)
    dense = hf_flax.dense_paths(held)
    params = _unfrozen(held.params)
    filled = trees.fill(params, given, turned=lambda path: dense.get(_layer(path)), declared=False)
    new = hf_flax.with_params(held, filled)
    new.recipe = recipe
    return new


def _with_shapes(model: Any) -> Any:
    """The model with parameters: one made with _do_init=False has only their shapes, and refuses to show them."""
    return model if model._is_initialized else hf_flax.with_params(model, model.params_shape_tree)


def _unfrozen(variables: Any) -> dict[str, Any]:
    """The variables as dicts that can be changed."""
    return flax.core.unfreeze(variables)


def params_of(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters, whether `variables` holds them alone or among other collections."""
    return variables.get("params", variables)


def layer_path(path: tuple[str, ...]) -> str:
    """The name of the Dense layer at a path in a module. A layer that is the whole module has an empty path, and is
    named after its kernel."""
    return ".".join(path) or "kernel"


def _key(layer: str, here: Mapping[str, Any]) -> str:
    """The path of a layer's kernel in the parameters, whose leaves are `here`. A kernel of another name is its own."""
    return layer if layer in here else f"{layer}.kernel"


def _layer(key: str) -> str:
    return key.removesuffix(".kernel")


def _kernels(params: Mapping[str, Any], layers: Mapping[str, bool]) -> dict[str, Matrix]:
    here = trees.leaves(params)
    keys = {path: _key(path, here) for path in layers}
    found = {path: Matrix(here[keys[path]], turned) for path, turned in layers.items() if keys[path] in here}
    return {path: _unboxed(m) for path, m in found.items() if not is_operator(m.array)}


def _declared(params: Mapping[str, Any], declared: Declared) -> dict[str, Matrix]:
    """The kernels of which a caller declares what is contracted, by path without ".kernel"."""
    if not declared:
        return {}
    arrays = {path: meta.unbox(leaf) for path, leaf in trees.leaves(params).items() if not is_operator(leaf)}
    named = {_layer(path): array for path, array in arrays.items() if getattr(array, "ndim", 0) > 1}
    told = declared_for(named, declared).items()
    return {path: Matrix(named[path], False, layout=layout_of(path, says, named[path])) for path, says in told}


def _marked(found: Mapping[str, Matrix], special: Mapping[str, str]) -> dict[str, Matrix]:
    """The matrices, of which those in `special` can't be quantized, for the reasons there."""
    return {path: dataclasses.replace(matrix, special=special.get(path)) for path, matrix in found.items()}


def _wrapped(variables: Mapping[str, Any]) -> dict[str, str]:
    """The layers whose kernels nn.WeightNorm or nn.SpectralNorm rewrites in each call, and the reason in words.

    These keep an array "layer/kernel/scale" or "layer/kernel/u" for a layer, which is within them or beside them.
    """
    found = {}
    for path in trees.leaves(_unfrozen(variables)):
        scope, _, name = path.rpartition(".")
        layer, within, last = name.partition("/kernel/")
        if within:
            wrapper = "nn.WeightNorm" if last == "scale" else "nn.SpectralNorm"
            scopes = scope.split(".")[1 if "params" in variables else 0 :]
            for outer in (scopes, scopes[:-1]):
                found[".".join([*outer, *layer.split("/")])] = f"within an {wrapper}, which rewrites its kernel"
    return found


def _unboxed(matrix: Matrix) -> Matrix:
    return dataclasses.replace(matrix, array=meta.unbox(matrix.array))


def _operators(params: Mapping[str, Any]) -> dict[str, Any]:
    return {_layer(path): meta.unbox(operator) for path, operator in trees.operators(params).items()}


def with_kernels(params: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with arrays or operators in place of kernels; an operator's arrays are boxed if the kernel was."""
    plain = _unfrozen(params)
    here = trees.leaves(plain)
    new = {}
    for path, given in done.items():
        key = _key(path, here)
        box, kernel = trees.box_of(here[key]), trees.as_before(here[key], given)
        new[key] = boxed(kernel, box) if box is not None and is_operator(kernel) else kernel
    return trees.replace(plain, new)
