"""Qwen2 (arXiv:2407.10671) and Qwen3 (arXiv:2505.09388): Llama's blocks with biases, or norms of queries and keys."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from any4_jax.models.config import WindowedConfig
from any4_jax.models.family import GGUF, Family
from any4_jax.models.gguf_config import build as build_from_gguf
from any4_jax.models.gguf_config import metadata
from any4_jax.models.gguf_file import GGUFFile
from any4_jax.models.hf_config import DecoderFile, build, read, windows
from any4_jax.models.llama import Llama
from any4_jax.models.llama_config import SILU
from any4_jax.models.llama_family import GGUF_NAMES, IGNORED, NAMES
from any4_jax.schema import Count, Index


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config(WindowedConfig):
    """The config of a Qwen2: queries, keys and values have biases, the output projection has none."""

    attention_bias: bool = True

    @property
    def output_bias(self) -> bool:
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(WindowedConfig):
    """The config of a Qwen3: each head of queries and keys is normalized."""

    @property
    def qk_norm(self) -> bool:
        return True


class QwenFile(DecoderFile):
    """The keys of config.json that Qwen2 and Qwen3 share, with transformers' defaults.

    Attributes:
        max_window_layers: the first block that has a window, if there is one.
    """

    num_key_value_heads: Count | None = 32
    max_position_embeddings: Count = 32768
    sliding_window: Count | None = 4096
    use_sliding_window: bool = False
    max_window_layers: Index = 28
    bos_token_id: Index | None = None
    eos_token_id: Index | tuple[Index, ...] | None = None


class Qwen3File(QwenFile):
    """config.json of a Qwen3."""

    head_dim: Count | None = 128


def windows_of(file: QwenFile) -> tuple[int | None, ...]:
    """The windows of the blocks; empty if there are none."""
    if not file.use_sliding_window or file.sliding_window is None:
        return ()
    late = tuple(index >= file.max_window_layers for index in range(file.num_hidden_layers))
    return windows(file, file.sliding_window, late)


def _qwen2_from_hf(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> Qwen2Config:
    file = read(QwenFile, config)
    return build(Qwen2Config, file, generation, SILU, windows=windows_of(file), attention_bias=True)


def _qwen3_from_hf(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> Qwen3Config:
    file = read(Qwen3File, config)
    return build(Qwen3Config, file, generation, SILU, windows=windows_of(file))


def _qwen2_from_gguf(file: GGUFFile) -> Qwen2Config:
    return build_from_gguf(Qwen2Config, file, metadata(file))


def _qwen3_from_gguf(file: GGUFFile) -> Qwen3Config:
    return build_from_gguf(Qwen3Config, file, metadata(file))


QWEN2 = Family(
    name="qwen2",
    module=Llama,
    config=Qwen2Config,
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    read_config=_qwen2_from_hf,
    names=NAMES,
    ignored=IGNORED,
    gguf=GGUF(architecture="qwen2", names=GGUF_NAMES, read_config=_qwen2_from_gguf),
)
"""Qwen2, Qwen2.5 and models of their shape."""

QWEN3 = Family(
    name="qwen3",
    module=Llama,
    config=Qwen3Config,
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    read_config=_qwen3_from_hf,
    names=NAMES,
    ignored=IGNORED,
    gguf=GGUF(architecture="qwen3", names=GGUF_NAMES, read_config=_qwen3_from_gguf),
)
"""Qwen3, dense."""
