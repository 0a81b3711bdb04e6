"""The row of the Llama family: the names of its tensors in each kind of file, which its relatives share."""

from any4_jax.models.config import LlamaConfig
from any4_jax.models.family import GGUF, Family
from any4_jax.models.gguf_config import ROPE_FACTORS, build, metadata
from any4_jax.models.gguf_file import GGUFFile
from any4_jax.models.llama import Llama
from any4_jax.models.llama_config import from_hf

NAMES = (
    ("embed_tokens.embedding", "model.embed_tokens.weight"),
    ("layers.{i}.{part}.{linear}_proj.kernel", "model.layers.{i}.{part}.{linear}_proj.weight"),
    ("layers.{i}.{part}.{linear}_proj.bias", "model.layers.{i}.{part}.{linear}_proj.bias"),
    ("layers.{i}.self_attn.{norm}_norm.scale", "model.layers.{i}.self_attn.{norm}_norm.weight"),
    ("layers.{i}.{norm}.scale", "model.layers.{i}.{norm}.weight"),
    ("norm.scale", "model.norm.weight"),
    ("lm_head.kernel", "lm_head.weight"),
)

# Old checkpoints store these tables, which are computed here.
IGNORED = ("model.rotary_emb.inv_freq", "model.layers.{i}.self_attn.rotary_emb.inv_freq")

GGUF_ATTENTION = (
    ("blk.{i}.attn_q.{leaf}", "model.layers.{i}.self_attn.q_proj.{leaf}"),
    ("blk.{i}.attn_k.{leaf}", "model.layers.{i}.self_attn.k_proj.{leaf}"),
    ("blk.{i}.attn_v.{leaf}", "model.layers.{i}.self_attn.v_proj.{leaf}"),
    ("blk.{i}.attn_output.{leaf}", "model.layers.{i}.self_attn.o_proj.{leaf}"),
    ("blk.{i}.attn_q_norm.{leaf}", "model.layers.{i}.self_attn.q_norm.{leaf}"),
    ("blk.{i}.attn_k_norm.{leaf}", "model.layers.{i}.self_attn.k_norm.{leaf}"),
)

GGUF_MLP = (
    ("blk.{i}.ffn_gate.{leaf}", "model.layers.{i}.mlp.gate_proj.{leaf}"),
    ("blk.{i}.ffn_up.{leaf}", "model.layers.{i}.mlp.up_proj.{leaf}"),
    ("blk.{i}.ffn_down.{leaf}", "model.layers.{i}.mlp.down_proj.{leaf}"),
)

GGUF_OUTSIDE = (
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
)

GGUF_NORMS = (
    ("blk.{i}.attn_norm.{leaf}", "model.layers.{i}.input_layernorm.{leaf}"),
    ("blk.{i}.ffn_norm.{leaf}", "model.layers.{i}.post_attention_layernorm.{leaf}"),
)

GGUF_NAMES = GGUF_ATTENTION + GGUF_MLP + GGUF_NORMS + GGUF_OUTSIDE

# llama.cpp's rope of this architecture rotates neighbouring channels; that of others rotates the halves.
GGUF_HEADS = (
    ("blk.{i}.attn_q.{leaf}", "num_attention_heads"),
    ("blk.{i}.attn_k.{leaf}", "num_key_value_heads"),
)


def _from_gguf(file: GGUFFile) -> LlamaConfig:
    return build(LlamaConfig, file, metadata(file))


LLAMA = Family(
    name="llama",
    module=Llama,
    config=LlamaConfig,
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    read_config=from_hf,
    names=NAMES,
    ignored=IGNORED,
    gguf=GGUF(
        architecture="llama",
        names=GGUF_NAMES,
        read_config=_from_gguf,
        heads=GGUF_HEADS,
        # Read with the config.
        ignored=(ROPE_FACTORS,),
    ),
)
"""Llama 2, 3, 3.1, 3.2 and models of their shape, such as SmolLM2."""
