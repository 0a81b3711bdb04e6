"""Reads a `LlamaConfig` from Hugging Face's config.json."""

from collections.abc import Mapping
from typing import Any

from any4_jax.models.config import LlamaConfig
from any4_jax.models.hf_config import DecoderFile, build, read

SILU = ("silu", "swish")


def from_hf(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> LlamaConfig:
    """The config of a config.json. An optional key that is absent has the default of transformers' LlamaConfig.

    Args:
        config: the content of config.json, in the form of transformers 4 or 5.
        generation: the content of generation_config.json; its eos_token_id, if it has one, takes precedence.

    Raises:
        ValueError: the activation or the rope type is not supported, or a number is missing, doesn't fit, or
            contradicts another.
    """
    return build(LlamaConfig, read(DecoderFile, config), generation, SILU)
