"""Converts Hugging Face folders, config.json and tensors under Hugging Face names, to decoders, and back."""

from collections.abc import Iterator, Mapping
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
from any4_jax.models.stored import Stored, floats
from any4_jax.models.tokenizer import Tokenizer
from any4_jax.one_line import shown
from any4_jax.regular_file import read_regular
from any4_jax.schema import Schema, check, read_json


class _Settings(Schema):
    """What a config.json says that no family has to know."""

    quantization_config: dict[str, Any] | None = None


def read_config(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> Any:
    """The config of a model, as an instance of its family's config class.

    Args:
        config: the content of config.json.
        generation: the content of generation_config.json; its eos_token_id, if it has one, takes precedence.

    Raises:
        ValueError: no family has the architecture, the stored weights are quantized, or the family refuses the config.
    """
    family = by_architecture(config)
    quantized = check(_Settings, config, "config.json", "take the file that belongs to the weights").quantization_config
    if quantized is not None:
        method = quantized.get("quant_method", "of an unnamed method")
        raise ValueError(
            f"the weights are quantized already ({shown(method)}), and float weights are needed; load the float model"
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
    tensors = _with_embedding(family, config, tensors)
    dtype = _stored_dtype(family, tensors) if dtype is None else np.dtype(dtype)
    # Each block has a tensor at least. Building the model before this is checked may take hours.
    if config.num_hidden_layers > len(tensors):
        raise ValueError(
            f"the config says num_hidden_layers={config.num_hidden_layers}, and there are {len(tensors)} tensors; use "
            "the config.json that belongs to them"
        )
    graphdef, state = nnx.split(family.abstract(config, dtype))
    variables = dict(nnx.to_flat_state(state))
    stored = {
        path: Stored.of(family, path, variable.get_value().shape, tensors) for path, variable in variables.items()
    }
    _check_names(family, tensors, {name for one in stored.values() for name in one.names})
    misshapen: list[str] = []
    for path, one in stored.items():
        value = one.read(tensors, dtype, misshapen)
        if value is not None:
            # Nobody else holds this copy, so jax may keep its buffer instead of copying again.
            variables[path] = variables[path].replace(jnp.asarray(value))
    if misshapen:
        raise ValueError(f"tensors don't have the shapes of the config: {_list(misshapen, 4)}; use its own config.json")
    filled: Decoder = nnx.merge(graphdef, nnx.from_flat_state(variables))
    return filled


def tensors_of(model: Decoder) -> dict[str, np.ndarray]:
    """The float tensors of a model under Hugging Face names, linears [N, K]; the inverse of `from_tensors`.

    Raises:
        TypeError: the model belongs to no family.
        ValueError: the model is quantized, or a dense layer was replaced by another module.
    """
    family = family_of(model)
    tensors: dict[str, np.ndarray] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value, dotted = variable.get_value(), ".".join(map(str, path))
        if renamed(family.names, dotted) is None or not isinstance(value, jax.Array):
            raise ValueError(f"{dotted} is not a dense float tensor; use the model before quantization")
        tensors.update(Stored.of(family, path, value.shape).write(np.asarray(value)))
    return tensors


def load_folder(folder: Path, dtype: DTypeLike | None = None) -> Decoder:
    """The model of a Hugging Face folder, with its tokenizer if there is a tokenizer.json.

    Raises:
        FileNotFoundError, ValueError: see `read_config`, `SafetensorsFolder`, `from_tensors`, `Tokenizer`.
    """
    content = _json(folder / "config.json")
    generation = folder / "generation_config.json"
    config = read_config(content, _json(generation) if generation.exists() else None)
    model = from_tensors(config, SafetensorsFolder(folder), dtype)
    model.tokenizer = Tokenizer.from_folder(folder)
    return model


def _stored_dtype(family: Family, tensors: Mapping[str, np.ndarray]) -> np.dtype:
    name = family.embedding
    if name not in tensors:
        raise ValueError(f"tensor {name} is missing; take the files of a {' or '.join(family.architectures)}")
    return floats(name, tensors[name]).dtype


def _with_embedding(family: Family, config: Any, tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The tensors; if a model ties embedding and head, and the file has only the head, that under the other name."""
    tied = getattr(config, "tie_word_embeddings", False)
    if not tied or family.embedding in tensors or family.head not in tensors:
        return tensors
    names = {name: name for name in tensors if name != family.head} | {family.embedding: family.head}
    return _Renamed(tensors, names)


class _Renamed(Mapping[str, np.ndarray]):
    """Tensors under other names."""

    def __init__(self, tensors: Mapping[str, np.ndarray], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


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
    unknown, missing = sorted(map(shown, found - wanted)), sorted(wanted - found)
    if unknown or missing:
        parts = [f"missing {_list(missing)}"] * bool(missing) + [f"unknown {_list(unknown)}"] * bool(unknown)
        raise ValueError(f"the tensors are not those of the config: {'; '.join(parts)}; use its own config.json")


def _list(items: list[str], most: int = 8) -> str:
    """The items as text: all of a few, the first of many."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; give the folder of a Hugging Face model")
    return read_json(read_regular(path), str(path))
