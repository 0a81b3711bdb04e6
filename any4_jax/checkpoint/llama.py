"""A Llama of this library as JSON and named arrays, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from any4_jax import surgery
from any4_jax.checkpoint.operators import operator_from_spec, operator_spec, recipe_from_spec, recipe_spec
from any4_jax.matmul import unprepare
from any4_jax.models.config import LlamaConfig, RopeScaling
from any4_jax.models.llama import Llama


def describe_llama(model: Llama, arrays: dict[str, Any]) -> dict[str, Any]:
    """JSON that describes a Llama; its arrays are added to `arrays` by name."""
    quantized = surgery.quantized_leaves(model)
    layers = {path: operator_spec(unprepare(op), path, arrays) for path, op in quantized.items()}
    names = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path[-2:-1] == ("arrays",) and ".".join(map(str, path[:-2])) in quantized:
            continue
        names.append(".".join(map(str, path)))
        arrays[names[-1]] = variable.get_value()
    return {
        "kind": "llama",
        "config": dataclasses.asdict(model.config),
        "dtype": str(model.dtype),
        "parameters": names,
        "layers": layers,
        "recipe": None if model.recipe is None else recipe_spec(model.recipe),
    }


def _config(content: Mapping[str, Any]) -> LlamaConfig:
    shape = dict(content["config"])
    if shape["rope_scaling"] is not None:
        shape["rope_scaling"] = RopeScaling(**shape["rope_scaling"])
    return LlamaConfig(**shape | {"eos_token_ids": tuple(shape["eos_token_ids"])})


def build_llama(content: Mapping[str, Any], arrays: Mapping[str, jax.Array]) -> Llama:
    """The inverse of `describe_llama`."""
    config = _config(content)
    model: Llama = nnx.eval_shape(lambda: Llama(config, dtype=jnp.dtype(content["dtype"]), rngs=nnx.Rngs(0)))
    held = surgery.holders(model)
    for path, spec in content["layers"].items():
        weight = operator_from_spec(spec, arrays.__getitem__)
        layer = held[path]
        if weight.shape != surgery.matrix_of(layer).shape:
            raise ValueError(
                f"{path} has shape {weight.shape}, the config needs another; the checkpoint contradicts itself"
            )
        surgery.replace_module(model, path, surgery.around(layer, weight))
    graphdef, state = nnx.split(model)
    variables = dict(nnx.to_flat_state(state))
    for name in content["parameters"]:
        key = tuple(int(part) if part.isdigit() else part for part in name.split("."))
        if variables[key].get_value().shape != arrays[name].shape:
            raise ValueError(
                f"{name} has shape {arrays[name].shape}, the config needs another; the checkpoint contradicts itself"
            )
        variables[key] = variables[key].replace(arrays[name])
    empty = [
        path for path, v in variables.items() if any(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(v))
    ]
    if empty:
        raise ValueError(f"parameter {'.'.join(map(str, empty[0]))} is missing; the checkpoint contradicts itself")
    model = nnx.merge(graphdef, nnx.from_flat_state(variables))
    if content["recipe"] is not None:
        model.recipe = recipe_from_spec(content["recipe"])
    return model


def check_llama(content: Mapping[str, Any], into: Any) -> None:
    """Raises ValueError unless `into` is a Llama of the config and dtype of a Llama's checkpoint."""
    if not isinstance(into, Llama):
        raise ValueError(
            f"it holds a Llama of this library and `into` is {surgery.container_of(into).name} "
            f"({type(into).__name__}); leave `into` out, or pass a Llama"
        )
    config = _config(content)
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(into.config, field.name)
        if ours != theirs:
            raise ValueError(f"its Llama has {field.name}={ours!r} and `into` has {theirs!r}; leave `into` out")
    if into.dtype != jnp.dtype(content["dtype"]):
        raise ValueError(f"its Llama is of {content['dtype']} and `into` of {into.dtype}; leave `into` out")
