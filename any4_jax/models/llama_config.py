"""Reads a `LlamaConfig` from Hugging Face's config.json, or from the metadata of a GGUF file."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from any4_jax.models.config import LlamaConfig, RopeScaling
from any4_jax.models.gguf_file import GGUFFile
from any4_jax.models.hf_config import eos_ids, refuse_missing, rope
from any4_jax.models.rope import Rope

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor of a GGUF file that divides the frequencies of its rotary embedding, float32 [D/2]."""

_ACTIVATIONS = ("silu", "swish")
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def from_hf(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> LlamaConfig:
    """The config of a config.json. An optional key that is absent has the default of transformers' LlamaConfig.

    Args:
        config: the content of config.json, in the form of transformers 4 or 5.
        generation: the content of generation_config.json; its eos_token_id, if it has one, takes precedence.

    Raises:
        ValueError: the activation or the rope type is not supported, or a number is missing or contradicts another.
    """
    activation = config.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"hidden_act {activation!r} is not supported, only {' and '.join(_ACTIVATIONS)} are; take another model"
        )
    refuse_missing(config, _REQUIRED)
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}; correct config.json"
        )
    if config.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}; set head_dim in config.json"
        )
    theta, scaling = rope(config)
    return LlamaConfig(
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(config["intermediate_size"]),
        num_hidden_layers=int(config["num_hidden_layers"]),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=int(config.get("head_dim") or hidden // heads),
        max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        bos_token_id=config.get("bos_token_id", 1),
        eos_token_ids=eos_ids(config, generation),
    )


def from_gguf(file: GGUFFile) -> LlamaConfig:
    """The config of a GGUF file whose architecture is llama.

    Raises:
        ValueError: a number is missing or differs from layer to layer, the model has experts, or its rope scaling isn't
            that of Llama 3.1.
    """
    metadata, number = file.metadata, file.number
    if number("expert_count", 0):
        raise ValueError(
            f"{file.path} has {number('expert_count')} experts, and only dense models are supported; take another model"
        )
    hidden, heads = number("embedding_length"), number("attention.head_count")
    size = number("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, size) != size:
            raise ValueError(
                f"llama.{key} of {file.path} is {number(key)}, and only the head size {size} is supported; take "
                "another model"
            )
    theta = float(number("rope.freq_base", 10000.0))
    ends = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    return LlamaConfig(
        vocab_size=int(number("vocab_size", len(metadata.get("tokenizer.ggml.tokens", [])))),
        hidden_size=hidden,
        intermediate_size=number("feed_forward_length"),
        num_hidden_layers=number("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=number("attention.head_count_kv", heads),
        head_dim=size,
        max_position_embeddings=number("context_length"),
        rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, Rope(size, theta)),
        tie_word_embeddings="output.weight" not in file,
        attention_bias="blk.0.attn_q.bias" in file,
        mlp_bias="blk.0.ffn_up.bias" in file,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
    )


def _rope_scaling(file: GGUFFile, plain: Rope) -> RopeScaling | None:
    kind = file.number("rope.scaling.type", "none")
    if kind == "none" and float(file.number("rope.scale_linear", 1.0)) != 1.0:
        kind = "linear"
    if kind != "none":
        raise ValueError(
            f"rope scaling {kind!r} of {file.path} is not supported, only that of Llama 3.1; take another model"
        )
    if ROPE_FACTORS not in file:
        return None
    scaling = scaling_of_factors(file[ROPE_FACTORS].astype(np.float64), plain)
    if scaling is None and np.any(file[ROPE_FACTORS] != 1):
        raise ValueError(
            f"{ROPE_FACTORS} of {file.path} holds factors that Llama 3.1's rule doesn't give; take another model"
        )
    return scaling


def scaling_of_factors(factors: np.ndarray, plain: Rope) -> RopeScaling | None:
    """The Llama 3.1 scaling that divides the frequencies of a rope by these factors; None if there is none.

    In an original context of c tokens, a frequency f makes n = c f / 2 pi turns, and 1 / factor is linear in n between
    low and high turns. So the blended entries give c / (high - low) and low / (high - low), which determine the
    function; low = 1, as in all published models, chooses one of its equivalent parametrizations.

    Args:
        factors: float64 [D/2], the tensor `ROPE_FACTORS`.
        plain: the unscaled rope.
    """
    if factors.shape != (plain.head_dim // 2,):
        return None
    frequencies = plain.frequencies().astype(np.float64)
    largest = float(factors.max())
    blended = (factors > 1 + 1e-6) & (factors < largest * (1 - 1e-6))
    if largest <= 1 or blended.sum() < 2:
        return None
    kept = (1 / factors[blended] - 1 / largest) / (1 - 1 / largest)
    slope, intercept = np.polyfit(frequencies[blended] / (2 * np.pi), kept, 1)
    if slope <= 0 or intercept >= 0:
        return None
    low, high = 1.0, round(1 - 1 / intercept, 3)
    context = round(slope * (high - low))
    scaling = RopeScaling(
        factor=largest, low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=context
    )
    scaled = Rope(plain.head_dim, plain.theta, scaling).frequencies()
    return scaling if np.allclose(frequencies / scaled, factors, rtol=1e-4, atol=0) else None
