"""The rows of Gemma 2 and Gemma 3 (text)."""

from collections.abc import Mapping
from typing import Any

from any4_jax.models.family import GGUF, Family
from any4_jax.models.gemma import Gemma, Gemma2Config, Gemma3Config
from any4_jax.models.gguf_config import DecoderMetadata, metadata
from any4_jax.models.gguf_config import build as build_from_gguf
from any4_jax.models.gguf_file import GGUFFile
from any4_jax.models.hf_config import CONFIG, DecoderFile, build, read, refuse_activation, windows
from any4_jax.models.llama_family import GGUF_ATTENTION, GGUF_MLP, GGUF_OUTSIDE, NAMES
from any4_jax.schema import Count, Index, Name, Positive

_GELU = ("gelu_pytorch_tanh",)
# The largest models, told by their number of blocks, divide scores by the channels a head would have if heads filled
# the hidden size; llama.cpp tells them apart in the same way.
_LARGEST = {"gemma2": 46, "gemma3": 62}
# Every second block of Gemma 2 sees all tokens, every sixth of Gemma 3.
_PERIOD = {"gemma2": 2, "gemma3": 6}


class GemmaFile(DecoderFile):
    """The keys of config.json that both have, with transformers' defaults of Gemma 2.

    Attributes:
        hidden_activation: the activation, whatever hidden_act says.
    """

    num_key_value_heads: Count | None = 4
    head_dim: Count | None = 256
    max_position_embeddings: Count = 8192
    tie_word_embeddings: bool = True
    bos_token_id: Index | None = 2
    eos_token_id: Index | tuple[Index, ...] | None = 1
    sliding_window: Count | None = 4096
    hidden_activation: Name | None = "gelu_pytorch_tanh"
    query_pre_attn_scalar: Positive = 256
    attn_logit_softcapping: Positive | None = 50.0
    final_logit_softcapping: Positive | None = 30.0


class Gemma3File(GemmaFile):
    """config.json of a Gemma 3.

    Attributes:
        sliding_window_pattern: every such block sees all tokens, where layer_types is absent.
    """

    max_position_embeddings: Count = 131072
    rope_theta: Positive = 1e6
    rope_local_base_freq: Positive = 10000.0
    sliding_window_pattern: Count = _PERIOD["gemma3"]
    use_bidirectional_attention: bool | None = None
    attn_logit_softcapping: Positive | None = None
    final_logit_softcapping: Positive | None = None


def _shared(file: GemmaFile, period: int) -> dict[str, Any]:
    refuse_activation("hidden_activation", file.hidden_activation or _GELU[0], _GELU)
    sliding = tuple(bool((index + 1) % period) for index in range(file.num_hidden_layers))
    return dict(
        windows=windows(file, file.sliding_window, sliding),
        query_pre_attn_scalar=file.query_pre_attn_scalar,
        attn_logit_softcapping=file.attn_logit_softcapping,
        final_logit_softcapping=file.final_logit_softcapping,
    )


def _gemma2_from_hf(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> Gemma2Config:
    file = read(GemmaFile, config)
    return build(Gemma2Config, file, generation, (file.hidden_act,), **_shared(file, _PERIOD["gemma2"]))


def _gemma3_from_hf(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> Gemma3Config:
    local = None
    parameters = config.get("rope_parameters")
    if isinstance(parameters, Mapping) and "full_attention" in parameters:
        # transformers 5 has a rope for each kind of block.
        local = (parameters.get("sliding_attention") or {}).get("rope_theta")
        config = {**config, "rope_parameters": parameters["full_attention"]}
    file = read(Gemma3File, config if local is None else {**config, "rope_local_base_freq": local})
    if file.use_bidirectional_attention:
        raise ValueError(
            f"{CONFIG} says use_bidirectional_attention, and only causal models are supported; take another"
        )
    return build(
        Gemma3Config,
        file,
        generation,
        (file.hidden_act,),
        rope_local_base_freq=file.rope_local_base_freq,
        **_shared(file, file.sliding_window_pattern),
    )


def _from_gguf(file: GGUFFile, said: DecoderMetadata) -> dict[str, Any]:
    largest = said.num_hidden_layers == _LARGEST[file.architecture]
    size = said.hidden_size // said.num_attention_heads
    sliding = (bool((index + 1) % _PERIOD[file.architecture]) for index in range(said.num_hidden_layers))
    return dict(
        windows=tuple(said.window if slides else None for slides in sliding),
        query_pre_attn_scalar=size if largest else said.key_length or size,
        attn_logit_softcapping=said.softcap,
        final_logit_softcapping=said.final_softcap,
    )


def _gemma2_from_gguf(file: GGUFFile) -> Gemma2Config:
    said = metadata(file)
    # The first files lack these; llama.cpp gives them the numbers of the published models.
    published = GemmaFile.model_fields
    missing = {
        "window": published["sliding_window"].default,
        "softcap": published["attn_logit_softcapping"].default,
        "final_softcap": published["final_logit_softcapping"].default,
    }
    said = said.model_copy(update={key: number for key, number in missing.items() if getattr(said, key) is None})
    return build_from_gguf(Gemma2Config, file, said, **_from_gguf(file, said))


def _gemma3_from_gguf(file: GGUFFile) -> Gemma3Config:
    said = metadata(file)
    return build_from_gguf(Gemma3Config, file, said, rope_local_base_freq=said.local_theta, **_from_gguf(file, said))


_GGUF_NAMES = (
    *GGUF_ATTENTION,
    *GGUF_MLP,
    *GGUF_OUTSIDE,
    ("blk.{i}.attn_norm.weight", "model.layers.{i}.input_layernorm.weight"),
    ("blk.{i}.post_attention_norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    ("blk.{i}.ffn_norm.weight", "model.layers.{i}.pre_feedforward_layernorm.weight"),
    ("blk.{i}.post_ffw_norm.weight", "model.layers.{i}.post_feedforward_layernorm.weight"),
)
_RAISED = ("blk.{i}.{norm}_norm.weight", "output_norm.weight")

GEMMA2 = Family(
    name="gemma2",
    module=Gemma,
    config=Gemma2Config,
    architectures=("Gemma2ForCausalLM",),
    model_types=("gemma2",),
    read_config=_gemma2_from_hf,
    names=NAMES,
    gguf=GGUF(architecture="gemma2", names=_GGUF_NAMES, read_config=_gemma2_from_gguf, raised=_RAISED),
)
"""Gemma 2."""

GEMMA3 = Family(
    name="gemma3",
    module=Gemma,
    config=Gemma3Config,
    architectures=("Gemma3ForCausalLM",),
    model_types=("gemma3_text",),
    read_config=_gemma3_from_hf,
    names=NAMES,
    gguf=GGUF(architecture="gemma3", names=_GGUF_NAMES, read_config=_gemma3_from_gguf, raised=_RAISED),
)
"""Gemma 3, text only."""
