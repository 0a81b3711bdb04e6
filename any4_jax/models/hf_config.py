"""`config.json` of Hugging Face, in the forms that transformers 4 and 5 write, as a `LlamaConfig`."""

from collections.abc import Mapping
from typing import Any

from any4_jax.models.config import LlamaConfig, RopeScaling

ARCHITECTURE = "LlamaForCausalLM"
_ACTIVATIONS = ("silu", "swish")
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> LlamaConfig:
    """The shape of a model; absent optional keys mean what transformers' LlamaConfig makes of them.

    Args:
        config: the content of config.json.
        generation: the content of generation_config.json, whose eos_token_id wins where it has one.

    Raises:
        ValueError: another architecture, activation, rope type or stored quantization than is supported, by
            name; a missing or contradictory number.
    """
    _refuse_others(config)
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}; take the file that belongs to the weights")
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}; correct config.json"
        )
    if config.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"hidden_size={hidden} is no multiple of num_attention_heads={heads}; say head_dim in config.json"
        )
    theta, scaling = _rope(config)
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
        eos_token_ids=_eos(config, generation or {}),
    )


def _refuse_others(config: Mapping[str, Any]) -> None:
    names = config.get("architectures")
    if names is not None and list(names) != [ARCHITECTURE]:
        raise ValueError(f"architecture {', '.join(names)} is not supported, only {ARCHITECTURE}; convert the model")
    if names is None and config.get("model_type") != "llama":
        raise ValueError(
            f"config.json names no architecture and model_type {config.get('model_type')!r}; only 'llama' is supported"
        )
    activation = config.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"hidden_act {activation!r} is not supported, only {' and '.join(_ACTIVATIONS)} are")
    if config.get("quantization_config") is not None:
        method = config["quantization_config"].get("quant_method", "of an unnamed method")
        raise ValueError(f"the weights are quantized already ({method}), and float weights are needed; load those")


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Transformers 5 keeps all of it in rope_parameters, 4 has rope_theta beside rope_scaling."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rope type {kind!r} is not supported, only 'default' and 'llama3' are")
    missing = [key for key in _SCALING if parameters.get(key) is None]
    if missing:
        raise ValueError(f"the llama3 rope scaling of config.json lacks {', '.join(missing)}; add what is missing")
    return theta, RopeScaling(
        factor=float(parameters["factor"]),
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_max_position_embeddings=int(parameters["original_max_position_embeddings"]),
    )


def _eos(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    ids = generation.get("eos_token_id")
    if ids is None:
        ids = config.get("eos_token_id", 2)
    if ids is None:
        return ()
    return tuple(int(i) for i in ids) if isinstance(ids, list | tuple) else (int(ids),)
