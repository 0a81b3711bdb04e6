"""Mistral (arXiv:2310.06825): the blocks of Llama, whose attention sees only the last tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from any4_jax.models.config import WindowedConfig
from any4_jax.models.family import Family
from any4_jax.models.hf_config import DecoderFile, build, read, windows
from any4_jax.models.llama import Llama
from any4_jax.models.llama_config import SILU
from any4_jax.models.llama_family import IGNORED, NAMES
from any4_jax.schema import Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistralConfig(WindowedConfig):
    """The config of a Mistral."""


class MistralFile(DecoderFile):
    """config.json, with the defaults of transformers' MistralConfig."""

    num_key_value_heads: Count | None = 8
    max_position_embeddings: Count = 131072
    sliding_window: Count | None = 4096


def windows_of(file: DecoderFile) -> tuple[int | None, ...]:
    """The same window in every block, or none."""
    if file.sliding_window is None:
        return ()
    return windows(file, file.sliding_window, (True,) * file.num_hidden_layers)


def _from_hf(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> MistralConfig:
    file = read(MistralFile, config)
    return build(MistralConfig, file, generation, SILU, windows=windows_of(file))


MISTRAL = Family(
    name="mistral",
    module=Llama,
    config=MistralConfig,
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    read_config=_from_hf,
    names=NAMES,
    ignored=IGNORED,
)
"""Mistral 7B and models of its shape. llama.cpp writes them as llamas, without a window."""
