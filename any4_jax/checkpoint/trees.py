"""Models as trees of arrays and operators, those as JSON and named arrays, and back."""

import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from any4_jax.checkpoint.operators import operator_from_spec, operator_spec, recipe_from_spec, recipe_spec
from any4_jax.matmul import unprepare
from any4_jax.models import flax_llama, hf_flax
from any4_jax.surgery import Recipe, container_of, linen_modules, recipe_of
from any4_jax.weights import is_operator


def to_arrays(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A quantized model as a nested dict of arrays alone, for an Orbax checkpoint of your own, and what rebuilds it.

    The dict has the names of the model's own tree: parameters of Linen and Hugging Face models (or the collections,
    where these were passed), variables of an NNX module by attribute, items of lists by number. An operator is a
    dict at the key "kernel" of its layer, with its fields for keys:

        layer/kernel/codes    uint8 [*L, N, ceil(K * bits / 8)], see any4_jax.packing; for 3, 5 and 6 bits a dict of
                              planes "0" and "1"
        layer/kernel/lut      [*L, N or 1, 2**bits]
        layer/kernel/scales   [*L, N, ceil(K/G)]; quantized scales are a dict like this one
        layer/kernel/offsets  like scales; absent for symmetric formats
        layer/bias            [*L, N], as every other array: what it was

    Operators over operators nest the same way: "inner", "terms/0", and so on.

    Args:
      model: of any kind that `quantize_model` takes.

    Returns:
      (arrays, spec): the dict, sharing the model's arrays, and plain JSON for `from_arrays`.

    Raises:
      ValueError: keys that are no strings, or hold "." or "/".
    """
    arrays: dict[str, Any] = {}
    spec = describe(model, arrays)
    return unflatten_dict({_keys(name): array for name, array in arrays.items()}), spec


def from_arrays(arrays: Mapping[str, Any], spec: Mapping[str, Any], *, into: Any = None) -> Any:
    """The inverse of `to_arrays`.

    Args:
      arrays: the nested dict, of jax or numpy arrays.
      spec: what `to_arrays` returned with it, after JSON or not.
      into: see `any4_jax.load`.

    Returns:
      The nested dict of arrays and operators, or with `into` a model like it.

    Raises:
      ValueError: arrays that the spec doesn't name, or lacks; contents that don't fit `into`.
    """
    flat = {keys: _array(array) for keys, array in flatten_dict(dict(arrays)).items()}
    named: set[tuple[str, ...]] = set()

    def take(name: str) -> Any:
        named.add(_keys(name))
        if _keys(name) not in flat:
            raise ValueError(f"the arrays lack {name!r} of the spec; pass the two that to_arrays returned together")
        return flat[_keys(name)]

    tree = build_tree(spec["tree"], take)
    unknown = [".".join(keys) for keys in flat if keys not in named]
    if unknown:
        raise ValueError(f"the spec has no array {unknown[0]!r}; pass the two that to_arrays returned together")
    return tree if into is None else container_of(into).fill(into, tree, recipe_in(spec))


def describe(model: Any, arrays: dict[str, Any]) -> dict[str, Any]:
    """JSON that describes a model; its arrays are added to `arrays` by name, see `any4_jax.save`."""
    recipe = recipe_of(model)
    return {
        "kind": "tree",
        "tree": describe_tree(container_of(model).tree(model), "", arrays),
        "model": _describe_model(model),
        "recipe": None if recipe is None else recipe_spec(recipe),
    }


def describe_tree(node: Any, name: str, arrays: dict[str, Any]) -> Any:
    """JSON that describes a tree; its arrays are added to `arrays` by dotted path, those of operators by
    "<dotted path>/<field>"."""
    if isinstance(node, Mapping):
        for key in node:
            if not isinstance(key, str) or "." in key or "/" in key:
                where = name or "the tree"
                raise ValueError(f"got the key {key!r} in {where!r}, need strings without '.' and '/'; rename it")
        return {
            "dict": {key: describe_tree(value, f"{name}.{key}" if name else key, arrays) for key, value in node.items()}
        }
    if isinstance(node, list | tuple):
        return {
            "list": [describe_tree(value, f"{name}.{i}" if name else str(i), arrays) for i, value in enumerate(node)]
        }
    node = unprepare(node)
    if is_operator(node):
        return {"leaf": operator_spec(node, name, arrays)}
    arrays[name] = node
    return {"leaf": {"array": name}}


def build_tree(spec: Mapping[str, Any], take: Any) -> Any:
    """The inverse of `describe_tree`; `take` gives the array of a name."""
    if "dict" in spec:
        return {key: build_tree(value, take) for key, value in spec["dict"].items()}
    if "list" in spec:
        return [build_tree(value, take) for value in spec["list"]]
    return operator_from_spec(spec["leaf"], take)


def recipe_in(content: Mapping[str, Any]) -> Recipe | None:
    """The recipe of what `describe` described."""
    return None if content.get("recipe") is None else recipe_from_spec(content["recipe"])


def _describe_model(model: Any) -> dict[str, Any] | None:
    """What besides its contents is known of a model: its kind and class, and all of a Hugging Face model."""
    if isinstance(model, nnx.Module):
        return {"kind": "nnx", "class": type(model).__name__}
    if linen_modules.is_pair(model):
        return {"kind": "linen", "class": type(getattr(model[0], "inner", model[0])).__name__}
    if not hf_flax.is_hf_flax(model):
        return None
    generation = json.loads(model.generation_config.to_json_string(use_diff=False))
    # Says that transformers may make it from the config anew; what was saved is to stay.
    generation.pop("_from_model_config", None)
    return {
        "kind": "hf_flax",
        "class": type(model).__name__,
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "generation": generation,
        "dtype": jnp.dtype(model.dtype).name,
        "repaired": flax_llama.is_repaired(model),
    }


def _keys(name: str) -> tuple[str, ...]:
    return tuple(name.replace("/", ".").split("."))


def _array(array: Any) -> Any:
    # Operators compute with jax arrays; other restorers give numpy's.
    return jnp.asarray(array) if isinstance(array, np.ndarray) else array
