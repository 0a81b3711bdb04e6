"""The row of OPT."""

from collections.abc import Mapping
from typing import Any

from any4_jax.models.family import Family
from any4_jax.models.hf_config import ADVICE, CONFIG, eos_ids, refuse_activation
from any4_jax.models.opt import ACTIVATIONS, OPT, OPTConfig
from any4_jax.schema import Count, Index, Name, Schema, check


class OPTFile(Schema):
    """config.json, with the defaults of transformers' OPTConfig."""

    vocab_size: Count = 50272
    hidden_size: Count = 768
    ffn_dim: Count = 3072
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 12
    max_position_embeddings: Count = 2048
    word_embed_proj_dim: Count | None = None
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = False
    layer_norm_elementwise_affine: bool = True
    enable_bias: bool = True
    activation_function: Name = "relu"
    tie_word_embeddings: bool = True
    bos_token_id: Index | None = 2
    eos_token_id: Index | tuple[Index, ...] | None = 2


def _from_hf(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> OPTConfig:
    # The published spelling has an underscore in front, which a schema's field can't have.
    content = {("remove_final_layer_norm" if key == "_remove_final_layer_norm" else key): config[key] for key in config}
    file = check(OPTFile, content, CONFIG, ADVICE)
    refuse_activation("activation_function", file.activation_function, tuple(ACTIVATIONS))
    try:
        return OPTConfig(
            vocab_size=file.vocab_size,
            hidden_size=file.hidden_size,
            ffn_dim=file.ffn_dim,
            num_hidden_layers=file.num_hidden_layers,
            num_attention_heads=file.num_attention_heads,
            max_position_embeddings=file.max_position_embeddings,
            word_embed_proj_dim=file.word_embed_proj_dim or file.hidden_size,
            do_layer_norm_before=file.do_layer_norm_before,
            final_norm=file.do_layer_norm_before and not file.remove_final_layer_norm,
            affine=file.layer_norm_elementwise_affine,
            enable_bias=file.enable_bias,
            activation_function=file.activation_function,
            tie_word_embeddings=file.tie_word_embeddings,
            bos_token_id=file.bos_token_id,
            eos_token_ids=eos_ids(file.eos_token_id, generation),
        )
    except ValueError as error:
        raise ValueError(f"{CONFIG}: {error}; {ADVICE}") from None


_DECODER = "model.decoder"
_LAYER = _DECODER + ".layers.{i}"

OPT_FAMILY = Family(
    name="opt",
    module=OPT,
    config=OPTConfig,
    architectures=("OPTForCausalLM",),
    model_types=("opt",),
    read_config=_from_hf,
    names=(
        ("embed_{table}.embedding", _DECODER + ".embed_{table}.weight"),
        ("layers.{i}.self_attn.o_proj.kernel", _LAYER + ".self_attn.out_proj.weight"),
        ("layers.{i}.self_attn.o_proj.bias", _LAYER + ".self_attn.out_proj.bias"),
        ("layers.{i}.self_attn.{linear}_proj.kernel", _LAYER + ".self_attn.{linear}_proj.weight"),
        ("layers.{i}.self_attn.{linear}_proj.bias", _LAYER + ".self_attn.{linear}_proj.bias"),
        ("layers.{i}.{layer}.kernel", _LAYER + ".{layer}.weight"),
        ("layers.{i}.{layer}.scale", _LAYER + ".{layer}.weight"),
        ("layers.{i}.{layer}.bias", _LAYER + ".{layer}.bias"),
        ("final_layer_norm.scale", _DECODER + ".final_layer_norm.weight"),
        ("final_layer_norm.bias", _DECODER + ".final_layer_norm.bias"),
        ("project_{way}.kernel", _DECODER + ".project_{way}.weight"),
        ("lm_head.kernel", "lm_head.weight"),
    ),
    embedding=_DECODER + ".embed_tokens.weight",
)
"""OPT of all sizes, and Galactica. llama.cpp has no files of it."""
