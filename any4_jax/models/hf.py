"""Converts Hugging Face folders, config.json and tensors under Hugging Face names, to decoders, and back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from any4_jax.models.base import Decoder
from any4_jax.models.families import by_architecture, family_of, family_of_config
from any4_jax.models.family import Family, matches, renamed
from any4_jax.models.safetensors_reader import SafetensorsFolder
from any4_jax.models.tokenizer import Tokenizer

_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(jnp.bfloat16))
_DTYPES = "float32, float16 or bfloat16"


def read_config(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> Any:
    """The config of a model, as an instance of its family's config class.

    Args:
        config: the content of config.json.
        generation: the content of generation_config.json; its eos_token_id, if it has one, takes precedence.

    Raises:
        ValueError: no family has the architecture, the stored weights are quantized, or the family refuses the config.
    """
    family = by_architecture(config)
    if config.get("quantization_config") is not None:
        method = config["quantization_config"].get("quant_method", "of an unnamed method")
        raise ValueError(
            f"the weights are quantized already ({method}), and float weights are needed; load the float model"
        )
    return family.read_config(config, generation)


def from_tensors(config: Any, tensors: Mapping[str, np.ndarray], dtype: DTypeLike | None = None) -> Decoder:
    """Builds a decoder from tensors under Hugging Face names, without creating random weights.

    Each tensor is looked up once, converted and put on the default device before the next is read, so a mapping that
    reads from disk needs memory for the model and one tensor.

    Args:
        config: the config of a registered family, see `any4_jax.models.families`.
        tensors: name -> float32, float16 or bfloat16 array; linears are [N, K].
        dtype: of all weights and activations; None takes the stored dtype of the embedding, to which norms of another
            dtype are converted.

    Raises:
        TypeError: the config belongs to no family.
        ValueError: tensors are unknown, missing or misshapen (the message names them), a tensor isn't float, or there
            is a head that differs from the embedding though the config ties them.
    """
    family = family_of_config(config)
    dtype = _stored_dtype(family, tensors) if dtype is None else np.dtype(dtype)
    graphdef, state = nnx.split(family.abstract(config, dtype))
    variables = dict(nnx.to_flat_state(state))
    wanted = {family.hf_name(path): path for path in variables}
    _check_names(family, tensors, set(wanted))
    misshapen = []
    for name, path in wanted.items():
        array = _floats(name, tensors[name])
        array = array.T if path[-1] == "kernel" else array
        expected = variables[path].get_value().shape
        if array.shape != expected:
            turn = -1 if path[-1] == "kernel" else 1
            misshapen.append(f"{name} {array.shape[::turn]} instead of {expected[::turn]}")
            continue
        # Nobody else holds this copy, so jax may keep its buffer instead of copying again.
        own = np.array(array, dtype=dtype, order="C", copy=True)
        variables[path] = variables[path].replace(jnp.asarray(own))
    if misshapen:
        raise ValueError(f"tensors don't have the shapes of the config: {_list(misshapen)}; use its own config.json")
    filled: Decoder = nnx.merge(graphdef, nnx.from_flat_state(variables))
    return filled


def tensors_of(model: Decoder) -> dict[str, np.ndarray]:
    """The float tensors of a model under Hugging Face names, linears [N, K]; the inverse of `from_tensors`.

    Raises:
        TypeError: the model belongs to no family.
        ValueError: the model is quantized, or a dense layer was replaced by another module.
    """
    family, tensors = family_of(model), {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value, dotted = variable.get_value(), ".".join(map(str, path))
        name = renamed(family.names, dotted)
        if name is None or not isinstance(value, jax.Array):
            raise ValueError(f"{dotted} is not a dense float tensor; use the model before quantization")
        tensors[name] = np.asarray(value).T if path[-1] == "kernel" else np.asarray(value)
    return tensors


def load_folder(folder: Path, dtype: DTypeLike | None = None) -> Decoder:
    """The model of a Hugging Face folder, with its tokenizer if there is a tokenizer.json.

    Raises:
        FileNotFoundError, ValueError: see `read_config`, `SafetensorsFolder`, `from_tensors`, `Tokenizer`.
    """
    content = _json(folder / "config.json")
    generation = folder / "generation_config.json"
    config = read_config(content, _json(generation) if generation.is_file() else None)
    model = from_tensors(config, SafetensorsFolder(folder), dtype)
    model.tokenizer = Tokenizer.from_folder(folder)
    return model


def _stored_dtype(family: Family, tensors: Mapping[str, np.ndarray]) -> np.dtype:
    name = family.embedding
    if name not in tensors:
        raise ValueError(f"tensor {name} is missing; take the files of a {' or '.join(family.architectures)}")
    return _floats(name, tensors[name]).dtype


def _floats(name: str, array: Any) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype not in _FLOATS:
        raise ValueError(f"tensor {name} is {array.dtype}, and {_DTYPES} is needed; load the float checkpoint")
    return array


def _check_names(family: Family, tensors: Mapping[str, np.ndarray], wanted: set[str]) -> None:
    found = {name for name in tensors if not matches(family.ignored, name)}
    head, embedding = family.head, family.embedding
    if head in found and head not in wanted and embedding in found:
        if not np.array_equal(tensors[head], tensors[embedding]):
            raise ValueError(
                f"{head} differs from {embedding} though the config says tie_word_embeddings; "
                "say tie_word_embeddings: false to use both, or remove the head"
            )
        found.remove(head)
    unknown, missing = sorted(found - wanted), sorted(wanted - found)
    if unknown or missing:
        parts = [f"missing {_list(missing)}"] * bool(missing) + [f"unknown {_list(unknown)}"] * bool(unknown)
        raise ValueError(f"the tensors are not those of the config: {'; '.join(parts)}; use its own config.json")


def _list(items: list[str]) -> str:
    """The items as text: all of a few, the first of many."""
    shown = 8
    return ", ".join(items[:shown]) + (f" and {len(items) - shown} more" if len(items) > shown else "")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; give the folder of a Hugging Face model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, and an object is needed; fetch it again")
    return content
