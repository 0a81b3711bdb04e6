"""Hugging Face names and folders: tensors under their names there <-> a `Llama`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from any4_jax.models.config import LlamaConfig
from any4_jax.models.hf_config import read_config
from any4_jax.models.llama import Llama
from any4_jax.models.safetensors_reader import SafetensorsFolder
from any4_jax.models.tokenizer import Tokenizer

VariablePath = tuple[str | int, ...]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# Hugging Face name -> path in Llama. Paths that end in "kernel" hold the transpose, [in, out] for [out, in].
_LAYER, _LINEAR = r"model\.layers\.(\d+)\.", r"(self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
NAMES: tuple[tuple[str, str], ...] = (
    (r"model\.embed_tokens\.weight", r"embed_tokens.embedding"),
    (_LAYER + _LINEAR + r"\.weight", r"layers.\1.\2.kernel"),
    (_LAYER + _LINEAR + r"\.bias", r"layers.\1.\2.bias"),
    (_LAYER + r"(input_layernorm|post_attention_layernorm)\.weight", r"layers.\1.\2.scale"),
    (r"model\.norm\.weight", r"norm.scale"),
    (r"lm_head\.weight", r"lm_head.kernel"),
)
# Tables that old checkpoints stored and that are computed here.
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(jnp.bfloat16))
_DTYPES = "float32, float16 or bfloat16"


def path_of(name: str) -> VariablePath | None:
    """Where in a `Llama` the tensor of a Hugging Face name lives; None for a name of something else."""
    for pattern, template in NAMES:
        if match := re.fullmatch(pattern, name):
            return tuple(int(part) if part.isdigit() else part for part in match.expand(template).split("."))
    return None


def name_of(path: tuple[Any, ...]) -> str:
    """The Hugging Face name of a path in a `Llama`, the inverse of `path_of`."""
    *module, leaf = (str(part) for part in path)
    stem = ".".join(module)
    return ("" if stem == "lm_head" else "model.") + stem + (".bias" if leaf == "bias" else ".weight")


def llama_from_tensors(config: LlamaConfig, tensors: Mapping[str, np.ndarray], dtype: DTypeLike | None = None) -> Llama:
    """A Llama of tensors under Hugging Face names; no random weight is ever made.

    Each tensor is looked up once, converted and put on the default device before the next is touched, so a
    mapping that reads from disk needs memory for the model and one tensor.

    Args:
        config: the shape.
        tensors: name -> float32, float16 or bfloat16 array; linears [N, K].
        dtype: of all weights and activations; None takes the dtype in which the embedding is stored. (Norms
            of another stored dtype are converted to it: a model has one.)

    Raises:
        ValueError: unknown, missing or misshapen tensors, all named; tensors that are no floats; a head of
            its own in a model that says it has none.
    """
    dtype = _stored_dtype(tensors) if dtype is None else np.dtype(dtype)
    model = nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    variables = dict(nnx.to_flat_state(state))
    wanted = {name_of(path): path for path in variables}
    _check_names(config, tensors, set(wanted))
    misshapen = []
    for name, path in wanted.items():
        array = _floats(name, tensors[name])
        array = array.T if path[-1] == "kernel" else array
        expected = variables[path].get_value().shape
        if array.shape != expected:
            turn = -1 if path[-1] == "kernel" else 1
            misshapen.append(f"{name} {array.shape[::turn]} instead of {expected[::turn]}")
            continue
        # The copy is ours alone, so that jax may keep the buffer instead of copying once more.
        own = np.array(array, dtype=dtype, order="C", copy=True)
        variables[path] = variables[path].replace(jnp.asarray(own))
    if misshapen:
        raise ValueError(f"tensors don't have the shapes of the config: {_list(misshapen)}; use its own config.json")
    filled: Llama = nnx.merge(graphdef, nnx.from_flat_state(variables))
    return filled


def tensors_of(model: Llama) -> dict[str, np.ndarray]:
    """The float tensors of a model under Hugging Face names, linears [N, K]; undoes `llama_from_tensors`.

    Raises:
        ValueError: a layer was replaced by one that is no dense layer.
    """
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value, name = variable.get_value(), name_of(path)
        if path_of(name) != path or not isinstance(value, jax.Array):
            raise ValueError(f"{'.'.join(map(str, path))} is no dense float tensor; use the model before quantization")
        tensors[name] = np.asarray(value).T if path[-1] == "kernel" else np.asarray(value)
    return tensors


def load_folder(folder: Path, dtype: DTypeLike | None = None) -> Llama:
    """The model and, where there is a tokenizer.json, the tokenizer of a Hugging Face folder.

    Raises:
        FileNotFoundError, ValueError: see `read_config`, `SafetensorsFolder`, `llama_from_tensors`,
            `Tokenizer`.
    """
    config = _json(folder / "config.json")
    generation = folder / "generation_config.json"
    shape = read_config(config, _json(generation) if generation.is_file() else None)
    model = llama_from_tensors(shape, SafetensorsFolder(folder), dtype)
    model.tokenizer = Tokenizer.from_folder(folder)
    return model


def _stored_dtype(tensors: Mapping[str, np.ndarray]) -> np.dtype:
    if EMBEDDING not in tensors:
        raise ValueError(f"tensor {EMBEDDING} is missing; take the files of a LlamaForCausalLM")
    return _floats(EMBEDDING, tensors[EMBEDDING]).dtype


def _floats(name: str, array: Any) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype not in _FLOATS:
        raise ValueError(f"tensor {name} is {array.dtype}, and {_DTYPES} is needed; load the float checkpoint")
    return array


def _check_names(config: LlamaConfig, tensors: Mapping[str, np.ndarray], wanted: set[str]) -> None:
    found = {name for name in tensors if not _IGNORED.fullmatch(name)}
    if config.tie_word_embeddings and HEAD in found and EMBEDDING in found:
        if not np.array_equal(tensors[HEAD], tensors[EMBEDDING]):
            raise ValueError(
                f"{HEAD} differs from {EMBEDDING} though the config says tie_word_embeddings; "
                "say tie_word_embeddings: false to use both, or remove the head"
            )
        found.remove(HEAD)
    unknown, missing = sorted(found - wanted), sorted(wanted - found)
    if unknown or missing:
        parts = [f"missing {_list(missing)}"] * bool(missing) + [f"unknown {_list(unknown)}"] * bool(unknown)
        raise ValueError(f"the tensors are not those of the config: {'; '.join(parts)}; use its own config.json")


def _list(items: list[str]) -> str:
    """All of a few, the first of many."""
    shown = 8
    return ", ".join(items[:shown]) + (f" and {len(items) - shown} more" if len(items) > shown else "")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; give the folder of a Hugging Face model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, and an object is needed; fetch it again")
    return content
