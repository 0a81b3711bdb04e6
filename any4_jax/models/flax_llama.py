"""FlaxLlamaForCausalLM of transformers 4, filled without torch and repaired.

FlaxLlama as transformers 4.57 has it turns positions by frequencies of base 10000 whatever `rope_theta` and
`rope_scaling` say, and has a head of its own even where `tie_word_embeddings` says there is none. In every attention
layer it builds a causal mask of max_position_embeddings^2 bytes, 17 GB for the 131072 positions of Llama 3.1, and in
every `generate` it initialises all weights again. `REPAIRS`, a head filled from the embedding and `with_params` fix
the four without editing a class of transformers: only the module of a model made here is run differently.
"""

import copy
import dataclasses
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
from any4_jax.models.rope import Rope

CLASS = "FlaxLlamaForCausalLM"
DEFAULT_THETA = 10000.0


def load_hf_flax(source: str | Path, *, dtype: DTypeLike | None = None) -> Any:
    """A FlaxLlamaForCausalLM of transformers 4 with our tokenizer in `.tokenizer` (None where the source has none).

    Read by this library, tensor by tensor, without torch; no random weight is made. Its `config` and
    `generation_config` are those of the source. It computes what torch's LlamaForCausalLM does: see `REPAIRS`; one
    UserWarning names what of the config transformers would have ignored, and none comes where there is nothing.

    transformers' `generate` for Flax stops at one token id. Where a source names several in `eos_token_id`, as the
    instruction models of Llama 3 do, it raises until it is given one: `hf.generate(..., eos_token_id=128009)`.

    Args:
        source: whatever `any4_jax.models.load` takes.
        dtype: of all weights and activations; None keeps what is stored.

    Raises:
        ImportError: transformers is absent, or of a version without Flax models.
        FileNotFoundError, ConnectionError, ValueError: see `any4_jax.models.load`; also a ValueError for another
            family than Llama, for biases in the MLPs and for heads of another width than hidden_size /
            num_attention_heads, which FlaxLlama lacks.
    """
    flax_transformers()
    llama = load(source, dtype=dtype)
    if not isinstance(llama, Llama):
        raise ValueError(
            f"{source} holds a {type(llama).__name__}, and FlaxLlama runs a Llama; use any4_jax.models.load"
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
    """The repaired FlaxLlamaForCausalLM without weights, as `abstract_model` makes it.

    Args:
        config: config.json's content or `hf.config.to_dict()`.
        dtype: of activations.

    Raises:
        ImportError: transformers is absent, or of a version without Flax models.
        ValueError: FlaxLlama can't compute this model, repaired or not.
    """
    shape = read_config(config)
    if shape.mlp_bias:
        raise ValueError("FlaxLlama has no biases in its MLPs and the config says mlp_bias; use any4_jax.models.load")
    if shape.head_dim * shape.num_attention_heads != shape.hidden_size:
        raise ValueError(
            f"FlaxLlama's heads are {shape.hidden_size}/{shape.num_attention_heads} channels wide and the config says "
            f"head_dim={shape.head_dim}; use any4_jax.models.load"
        )
    return abstract_model(CLASS, config, dtype, *REPAIRS)


def is_repaired(hf: Any) -> bool:
    """Whether a Hugging Face model runs under `REPAIRS`."""
    return set(REPAIRS) <= set(getattr(hf.module, "interceptors", ()))


def rotary_embedding(
    next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    """Interceptor: positions turn by the rope_theta and rope_scaling of the config."""
    if not _is_method(context, "FlaxLlamaRotaryEmbedding", "setup", "__call__"):
        return next_fun(*args, **kwargs)
    if context.method_name == "setup":
        return None  # A table of max_position_embeddings angles, which nobody reads.
    key, query, positions = args
    rope = Rope.of(read_config(context.module.config.to_dict()))
    return rope.rotate(key, positions), rope.rotate(query, positions)


def causal_mask(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Interceptor: of the causal mask, the rows that are computed and the columns that are stored."""
    if not _is_method(context, "FlaxLlamaAttention", "setup", "__call__"):
        return next_fun(*args, **kwargs)
    module: Any = context.module
    if context.method_name == "setup":
        config = module.config
        small = copy.copy(config)
        small.max_position_embeddings = 1
        # Flax freezes modules, and its own __setattr__ would refuse.
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
    # The module slices its mask from row `first` on. A slice is moved back to fit, here to row 0.
    object.__setattr__(module, "causal_mask", (jnp.arange(keys) <= rows[:, None])[None, None])
    return next_fun(*args, **kwargs)


REPAIRS = (rotary_embedding, causal_mask)
"""The interceptors that make FlaxLlama compute what its config says, in memory that its cache needs anyway."""


def _is_method(context: nn.module.InterceptorContext, name: str, *methods: str) -> bool:
    return context.method_name in methods and type(context.module).__name__ == name


def _configs(source: str | Path, shape: LlamaConfig) -> tuple[dict[str, Any], Any]:
    """config.json as a dict and, where there is a generation_config.json, transformers' GenerationConfig."""
    transformers = flax_transformers()
    path = Path(source).expanduser()
    if path.is_file() or (str(source) == "tiny" and not path.is_dir()):
        return _config_of(shape), None
    where = str(path) if path.is_dir() else str(source)
    config, _ = transformers.LlamaConfig.get_config_dict(where)
    try:
        return config, transformers.GenerationConfig.from_pretrained(where)
    except OSError:  # optional
        return config, None


def _config_of(shape: LlamaConfig) -> dict[str, Any]:
    """Our config in the words of config.json."""
    config = dataclasses.asdict(shape)
    eos, scaling = list(config.pop("eos_token_ids")), config.pop("rope_scaling")
    config["model_type"] = "llama"
    config["eos_token_id"] = eos if len(eos) > 1 else (eos or [None])[0]
    config["rope_scaling"] = None if scaling is None else {"rope_type": "llama3", **scaling}
    return config


def _params(llama: Llama) -> dict[str, Any]:
    """The arrays of a Llama where FlaxLlama looks for them, shared but for a tied head's."""
    flat: dict[tuple[str, ...], jax.Array] = {}
    for path, variable in nnx.to_flat_state(nnx.state(llama)):
        names = tuple(map(str, path))
        names = (*names[:-1], "weight") if names[-1] == "scale" else names
        flat[names if names[0] == "lm_head" else ("model", *names)] = variable.get_value()
    if llama.config.tie_word_embeddings:
        flat["lm_head", "kernel"] = flat["model", "embed_tokens", "embedding"].T
    return unflatten_dict(flat)


def _ignored(shape: LlamaConfig) -> list[str]:
    """What of a config FlaxLlama, left alone, would compute as if it said something else."""
    ignored = []
    if shape.rope_theta != DEFAULT_THETA:
        ignored.append(f"rope_theta={shape.rope_theta:g}")
    if shape.rope_scaling is not None:
        ignored.append("rope_scaling")
    if shape.tie_word_embeddings:
        ignored.append("tie_word_embeddings")
    return ignored
