"""FlaxLlamaForCausalLM of transformers 4, filled without torch and repaired.

FlaxLlama in transformers 4.57 has four defects. It rotates positions by frequencies of base 10000 whatever `rope_theta`
and `rope_scaling` say. It has a separate head even if `tie_word_embeddings` says that there is none. Every attention
layer builds a causal mask of max_position_embeddings^2 bytes, 17 GB for the 131072 positions of Llama 3.1. Every
`generate` initialises all weights again. `REPAIRS`, a head filled from the embedding, and `with_params` fix the four
without editing any class of transformers: only the module of a model that is created here runs differently.
"""

import copy
import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike

from any4_jax.models.config import LlamaConfig
from any4_jax.models.hf import read_config
from any4_jax.models.hf_flax import abstract_model, flax_transformers, with_params
from any4_jax.models.llama import Llama
from any4_jax.models.loading import load

CLASS = "FlaxLlamaForCausalLM"
DEFAULT_THETA = 10000.0


def load_hf_flax(source: str | Path, *, dtype: DTypeLike | None = None) -> Any:
    """A FlaxLlamaForCausalLM of transformers 4 with our tokenizer in `.tokenizer` (None if the source has none).

    This library reads it tensor by tensor, without torch and without creating random weights. Its `config` and
    `generation_config` are those of the source. It computes what torch's LlamaForCausalLM computes (see `REPAIRS`); if
    transformers would have ignored settings of the config, one UserWarning names them.

    transformers' `generate` for Flax stops at a single token id. If a source names several in `eos_token_id`, as the
    instruction models of Llama 3 do, it raises unless it is given one: `hf.generate(..., eos_token_id=128009)`.

    Args:
        source: whatever `any4_jax.models.load` takes.
        dtype: of all weights and activations; None keeps what is stored.

    Raises:
        ImportError: transformers is absent, or has no Flax models.
        FileNotFoundError, ConnectionError, ValueError: see `any4_jax.models.load`. Also ValueError if the model is not
            a Llama, or has what FlaxLlama lacks: biases in the MLPs, or heads whose width isn't hidden_size /
            num_attention_heads.
    """
    flax_transformers()
    llama = load(source, dtype=dtype)
    if not isinstance(llama, Llama):
        raise ValueError(
            f"{source} holds a {type(llama).__name__}, and FlaxLlama needs a Llama; use any4_jax.models.load"
        )
    config, generation = _configs(source, llama.config)
    abstract = abstract_flax_llama(config, llama.dtype)
    hf = with_params(abstract, _params(llama))
    if generation is not None:
        hf.generation_config = generation
    hf.tokenizer = llama.tokenizer
    ignored = _ignored(llama.config)
    if ignored:
        warnings.warn(
            f"transformers' FlaxLlama ignores {', '.join(ignored)} of this model's config; repaired in this instance",
            UserWarning,
            stacklevel=2,
        )
    return hf


def abstract_flax_llama(config: Mapping[str, Any], dtype: DTypeLike) -> Any:
    """The repaired FlaxLlamaForCausalLM without weights, as `abstract_model` creates it.

    Args:
        config: the content of config.json, or `hf.config.to_dict()`.
        dtype: of activations.

    Raises:
        ImportError: transformers is absent, or has no Flax models.
        ValueError: FlaxLlama can't compute this model, repaired or not.
    """
    shape = read_config(config)
    if shape.mlp_bias:
        raise ValueError("the config says mlp_bias, and FlaxLlama's MLPs have no biases; use any4_jax.models.load")
    if shape.head_dim * shape.num_attention_heads != shape.hidden_size:
        raise ValueError(
            f"the config says head_dim={shape.head_dim}, and FlaxLlama's heads have {shape.hidden_size}/"
            f"{shape.num_attention_heads} channels; use any4_jax.models.load"
        )
    return abstract_model(CLASS, config, dtype, *REPAIRS)


def is_repaired(hf: Any) -> bool:
    """Whether a Hugging Face model runs under `REPAIRS`."""
    return set(REPAIRS) <= set(getattr(hf.module, "interceptors", ()))


def rotary_embedding(
    next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    """Interceptor: rotates positions by the rope_theta and rope_scaling of the config."""
    if not _is_method(context, "FlaxLlamaRotaryEmbedding", "setup", "__call__"):
        return next_fun(*args, **kwargs)
    if context.method_name == "setup":
        return None  # It would build a table of max_position_embeddings angles, which nothing reads.
    key, query, positions = args
    rope = read_config(context.module.config.to_dict()).rope(0)
    return rope.rotate(key, positions), rope.rotate(query, positions)


def causal_mask(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Interceptor: builds only the rows of the causal mask that are computed and the columns that are stored."""
    if not _is_method(context, "FlaxLlamaAttention", "setup", "__call__"):
        return next_fun(*args, **kwargs)
    module: Any = context.module
    if context.method_name == "setup":
        config = module.config
        small = copy.copy(config)
        small.max_position_embeddings = 1
        # Flax freezes modules: the module's own __setattr__ would refuse.
        object.__setattr__(module, "config", small)
        try:
            return next_fun(*args, **kwargs)
        finally:
            object.__setattr__(module, "config", config)
    queries, keys, first = args[0].shape[1], args[0].shape[1], 0
    if module.has_variable("cache", "cached_key"):
        keys = module.get_variable("cache", "cached_key").shape[1]
        first = module.get_variable("cache", "cache_index")
    rows = first + jnp.arange(queries)
    # The module slices its mask from row `first` on. JAX moves a slice back until it fits, which here is row 0.
    object.__setattr__(module, "causal_mask", (jnp.arange(keys) <= rows[:, None])[None, None])
    return next_fun(*args, **kwargs)


REPAIRS = (rotary_embedding, causal_mask)
"""The interceptors that make FlaxLlama compute what its config says, in the memory that its cache needs anyway."""


def _is_method(context: nn.module.InterceptorContext, name: str, *methods: str) -> bool:
    return context.method_name in methods and type(context.module).__name__ == name


def _configs(source: str | Path, shape: LlamaConfig) -> tuple[dict[str, Any], Any]:
    """config.json as a dict, and transformers' GenerationConfig if there is a generation_config.json."""
    transformers = flax_transformers()
    path = Path(os.path.expanduser(source))
    if path.is_file() or (str(source) == "tiny" and not path.is_dir()):
        return _config_of(shape), None
    where = str(path) if path.is_dir() else str(source)
    config, _ = transformers.LlamaConfig.get_config_dict(where)
    try:
        return config, transformers.GenerationConfig.from_pretrained(where)
    except OSError:  # optional
        return config, None


def _config_of(shape: LlamaConfig) -> dict[str, Any]:
    """Our config in the form of config.json."""
    config = dataclasses.asdict(shape)
    eos, scaling = list(config.pop("eos_token_ids")), config.pop("rope_scaling")
    config["model_type"] = "llama"
    config["eos_token_id"] = eos if len(eos) > 1 else (eos or [None])[0]
    config["rope_scaling"] = scaling
    return config


def _params(llama: Llama) -> dict[str, Any]:
    """The arrays of a Llama where FlaxLlama looks for them; all are shared except that of a tied head."""
    flat: dict[tuple[str, ...], jax.Array] = {}
    for path, variable in nnx.to_flat_state(nnx.state(llama)):
        names = tuple(map(str, path))
        names = (*names[:-1], "weight") if names[-1] == "scale" else names
        flat[names if names[0] == "lm_head" else ("model", *names)] = variable.get_value()
    if llama.config.tie_word_embeddings:
        flat["lm_head", "kernel"] = flat["model", "embed_tokens", "embedding"].T
    return unflatten_dict(flat)


def _ignored(shape: LlamaConfig) -> list[str]:
    """The settings of a config that FlaxLlama without `REPAIRS` would ignore."""
    ignored = []
    if shape.rope_theta != DEFAULT_THETA:
        ignored.append(f"rope_theta={shape.rope_theta:g}")
    if shape.rope_scaling is not None:
        ignored.append("rope_scaling")
    if shape.tie_word_embeddings:
        ignored.append("tie_word_embeddings")
    return ignored
