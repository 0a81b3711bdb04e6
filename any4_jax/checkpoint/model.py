"""Save and load: a model or a tree of arrays to a checkpoint and back, never through float weights."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from any4_jax import surgery
from any4_jax.checkpoint import store
from any4_jax.checkpoint.arrays import ShardingRule
from any4_jax.checkpoint.operators import operator_from_spec, operator_spec, recipe_from_spec, recipe_spec
from any4_jax.matmul import unprepare
from any4_jax.models.config import LlamaConfig, RopeScaling
from any4_jax.models.llama import Llama
from any4_jax.models.tokenizer import Tokenizer
from any4_jax.nn.nnx import Any4Linear
from any4_jax.weights import is_operator

_TOKENIZER = "tokenizer/"


def save(path: str | os.PathLike[str], model: Any) -> None:
    """Writes a checkpoint, replacing the one at `path` as a whole or not at all.

    The manifest, any4.json, says everything that `load` needs: the model's shape, its tokenizer's files, for each
    quantized layer the operator, the method with all its fields and what "auto" settings came to, and the sha256 of
    every array and file. Arrays are named "<path of the layer>/<field>", other parameters by their dotted path.

    Args:
      path: a directory; it may hold an older checkpoint.
      model: a Llama of this library, quantized or not, or a dict (nested, string keys) of arrays and operators.

    Raises:
      TypeError: a model of another kind.
      ValueError: a dict with keys that are no strings, or hold "." or "/".
      FileExistsError, OSError: `path` holds other things, can't be written, or another save to it is running.
    """
    arrays: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    if isinstance(model, Llama):
        content = _describe_llama(model, arrays)
        if model.tokenizer is not None:
            files = {_TOKENIZER + name: raw for name, raw in model.tokenizer.files.items()}
    elif isinstance(model, Mapping):
        content = {"kind": "tree", "tree": _describe_tree(model, "", arrays)}
    else:
        raise TypeError(
            f"got a {type(model).__name__}, save takes a Llama of this library or a dict of arrays; convert it"
        )
    store.write(path, arrays, content, files)


def load(path: str | os.PathLike[str], *, sharding: ShardingRule = None) -> Any:
    """The model or tree of a checkpoint, every byte checked.

    Args:
      path: what `save` wrote.
      sharding: None for the default device, one jax.sharding.Sharding for all arrays, or a function of (array name,
        ShapeDtypeStruct) that gives one.

    Raises:
      FileNotFoundError: no checkpoint there.
      ValueError: a damaged one (the file is named), or one of a newer version.
    """
    arrays, content, files = store.read(path, sharding=sharding)
    try:
        if content.get("kind") == "tree":
            return _build_tree(content["tree"], arrays)
        if content.get("kind") == "llama":
            return _build_llama(content, arrays, files)
    except (KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path}: any4.json lacks or misnames {error}; save it again") from error
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from None
    raise ValueError(
        f"checkpoint {path} holds a {content.get('kind')!r}, this version loads llama and tree; upgrade any4_jax"
    )


def _describe_llama(model: Llama, arrays: dict[str, Any]) -> dict[str, Any]:
    quantized = surgery.quantized_leaves(model)
    layers = {path: operator_spec(unprepare(op), path, arrays) for path, op in quantized.items()}
    names = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if ".".join(map(str, path[:-1])) in quantized and path[-1] in ("tables", "codes"):
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


def _build_llama(content: Mapping[str, Any], arrays: Mapping[str, jax.Array], files: Mapping[str, bytes]) -> Llama:
    shape = dict(content["config"])
    if shape["rope_scaling"] is not None:
        shape["rope_scaling"] = RopeScaling(**shape["rope_scaling"])
    config = LlamaConfig(**shape | {"eos_token_ids": tuple(shape["eos_token_ids"])})
    model: Llama = nnx.eval_shape(lambda: Llama(config, dtype=jnp.dtype(content["dtype"]), rngs=nnx.Rngs(0)))
    dense = surgery.linears(model)
    for path, spec in content["layers"].items():
        bias = arrays.get(f"{path}.bias")
        weight = operator_from_spec(spec, arrays.__getitem__)
        if weight.shape != (dense[path].out_features, dense[path].in_features):
            raise ValueError(
                f"{path} has shape {weight.shape}, the config needs another; the checkpoint contradicts itself"
            )
        surgery.replace_module(model, path, Any4Linear(weight, bias=bias, dtype=dense[path].dtype))
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
    tokenizer = {name.removeprefix(_TOKENIZER): raw for name, raw in files.items() if name.startswith(_TOKENIZER)}
    model.tokenizer = Tokenizer.from_files(tokenizer) if tokenizer else None
    return model


def _describe_tree(node: Any, name: str, arrays: dict[str, Any]) -> Any:
    if isinstance(node, Mapping):
        for key in node:
            if not isinstance(key, str) or "." in key or "/" in key:
                where = name or "the tree"
                raise ValueError(f"got the key {key!r} in {where!r}, need strings without '.' and '/'; rename it")
        return {
            "dict": {
                key: _describe_tree(value, f"{name}.{key}" if name else key, arrays) for key, value in node.items()
            }
        }
    if isinstance(node, (list, tuple)):
        return {
            "list": [_describe_tree(value, f"{name}.{i}" if name else str(i), arrays) for i, value in enumerate(node)]
        }
    node = unprepare(node)
    if is_operator(node):
        return {"leaf": operator_spec(node, name, arrays)}
    arrays[name] = node
    return {"leaf": {"array": name}}


def _build_tree(spec: Mapping[str, Any], arrays: Mapping[str, jax.Array]) -> Any:
    if "dict" in spec:
        return {key: _build_tree(value, arrays) for key, value in spec["dict"].items()}
    if "list" in spec:
        return [_build_tree(value, arrays) for value in spec["list"]]
    return operator_from_spec(spec["leaf"], arrays.__getitem__)
