"""Reads the configs of decoders with the blocks of Llama from the metadata of GGUF files."""

from typing import Any, TypeVar

import numpy as np
from pydantic import Field

from any4_jax.models.config import LlamaConfig
from any4_jax.models.gguf_file import GGUFFile
from any4_jax.models.rope import Rope
from any4_jax.models.rope_scaling import AnyScaling, LinearScaling, RopeScaling, YarnScaling
from any4_jax.schema import Count, Index, Name, Positive, Schema, check

C = TypeVar("C", bound=LlamaConfig)

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor of a GGUF file that divides the frequencies of its rotary embedding, float32 [D/2]."""

ADVICE = "convert the model again"


class DecoderMetadata(Schema):
    """The keys "<architecture>.<key>" that all have."""

    hidden_size: Count = Field(alias="embedding_length")
    intermediate_size: Count = Field(alias="feed_forward_length")
    num_hidden_layers: Count = Field(alias="block_count")
    num_attention_heads: Count = Field(alias="attention.head_count")
    num_key_value_heads: Count | None = Field(None, alias="attention.head_count_kv")
    key_length: Count | None = Field(None, alias="attention.key_length")
    value_length: Count | None = Field(None, alias="attention.value_length")
    rotated: Count | None = Field(None, alias="rope.dimension_count")
    max_position_embeddings: Count = Field(alias="context_length")
    rms_norm_eps: Positive = Field(alias="attention.layer_norm_rms_epsilon")
    rope_theta: Positive = Field(10000.0, alias="rope.freq_base")
    local_theta: Positive = Field(10000.0, alias="rope.freq_base_swa")
    vocab_size: Count | None = None
    scaling: Name = Field("none", alias="rope.scaling.type")
    old_factor: Positive = Field(1.0, alias="rope.scale_linear")
    factor: Positive | None = Field(None, alias="rope.scaling.factor")
    attention_factor: Positive | None = Field(None, alias="rope.scaling.attn_factor")
    original_context: Count | None = Field(None, alias="rope.scaling.original_context_length")
    window: Count | None = Field(None, alias="attention.sliding_window")
    experts: Count | None = Field(None, alias="expert_count")
    used_experts: Count | None = Field(None, alias="expert_used_count")
    expert_size: Count | None = Field(None, alias="expert_feed_forward_length")
    softcap: Positive | None = Field(None, alias="attn_logit_softcapping")
    final_softcap: Positive | None = Field(None, alias="final_logit_softcapping")


class TokenIds(Schema):
    """The keys "tokenizer.ggml.<name>_token_id"."""

    bos: Index | None = None
    eos: Index | None = None
    eot: Index | None = None
    eom: Index | None = None


def metadata(file: GGUFFile) -> DecoderMetadata:
    """What a file says of its architecture.

    Raises:
        ValueError: a key is missing, differs from layer to layer, or has a value that doesn't fit.
    """
    keys = (field.alias or name for name, field in DecoderMetadata.model_fields.items())
    content = {key: file.number(key) for key in keys if f"{file.architecture}.{key}" in file.metadata}
    return check(DecoderMetadata, content, f"{file.path}: {file.architecture}", ADVICE)


def build(cls: type[C], file: GGUFFile, said: DecoderMetadata, **own: Any) -> C:
    """The config of a family from a file's metadata.

    Args:
        cls: the class of the config.
        file: the file.
        said: what `metadata` returned for it.
        own: the fields that the metadata doesn't have, and those that replace its own.

    Raises:
        ValueError: heads of keys and values differ in size, the rope scaling is not supported, or a number contradicts
            another.
    """
    heads = said.num_attention_heads
    size = said.key_length or said.hidden_size // heads
    for key, found in (("attention.value_length", said.value_length), ("rope.dimension_count", said.rotated)):
        if found not in (None, size):
            raise ValueError(
                f"{file.architecture}.{key} of {file.path} is {found}, and only the head size {size} is supported; "
                "take another model"
            )
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    listed = len(tokens) if isinstance(tokens, list) else None
    ids = {name: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in TokenIds.model_fields}
    special = check(TokenIds, ids, f"{file.path}: tokenizer.ggml's token ids", ADVICE)
    ends = (special.eos, special.eot, special.eom)
    fields = dict(
        vocab_size=said.vocab_size or listed,
        hidden_size=said.hidden_size,
        intermediate_size=said.intermediate_size,
        num_hidden_layers=said.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=said.num_key_value_heads or heads,
        head_dim=size,
        max_position_embeddings=said.max_position_embeddings,
        rms_norm_eps=said.rms_norm_eps,
        rope_theta=said.rope_theta,
        rope_scaling=_scaling(file, said, Rope(size, said.rope_theta)),
        tie_word_embeddings="output.weight" not in file,
        attention_bias="blk.0.attn_q.bias" in file,
        mlp_bias="blk.0.ffn_up.bias" in file,
        bos_token_id=special.bos,
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
    )
    if (fields | own)["vocab_size"] is None:
        raise ValueError(f"{file.path} has neither {file.architecture}.vocab_size nor a tokenizer's tokens; {ADVICE}")
    try:
        return cls(**fields | own)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}; {ADVICE}") from None


def _scaling(file: GGUFFile, said: DecoderMetadata, plain: Rope) -> AnyScaling | None:
    kind, factor = said.scaling, said.factor
    if kind == "none" and said.old_factor != 1:
        kind, factor = "linear", said.old_factor
    if kind in ("linear", "yarn"):
        if factor is None:
            raise ValueError(f"{file.path} lacks {file.architecture}.rope.scaling.factor; {ADVICE}")
        if kind == "linear":
            return LinearScaling(factor=factor)
        context = said.original_context or said.max_position_embeddings
        # A file's attn_factor multiplies the growth that the factor implies.
        implied = YarnScaling(factor=factor, original_max_position_embeddings=context)
        return YarnScaling(
            factor=factor,
            original_max_position_embeddings=context,
            attention_factor=implied.amplitude * (said.attention_factor or 1.0),
        )
    if kind != "none":
        raise ValueError(
            f"rope scaling {kind!r} of {file.path} is not supported, only linear, yarn and that of Llama 3.1 are; take "
            "another model"
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
