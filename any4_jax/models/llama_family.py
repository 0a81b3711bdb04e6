"""The row of the Llama family: the names of its tensors in each kind of file."""

from any4_jax.models.config import LlamaConfig
from any4_jax.models.family import GGUF, Family
from any4_jax.models.llama import Llama
from any4_jax.models.llama_config import ROPE_FACTORS, from_gguf, from_hf

LLAMA = Family(
    name="llama",
    module=Llama,
    config=LlamaConfig,
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    read_config=from_hf,
    names=(
        ("embed_tokens.embedding", "model.embed_tokens.weight"),
        ("layers.{i}.{part}.{linear}_proj.kernel", "model.layers.{i}.{part}.{linear}_proj.weight"),
        ("layers.{i}.{part}.{linear}_proj.bias", "model.layers.{i}.{part}.{linear}_proj.bias"),
        ("layers.{i}.{norm}.scale", "model.layers.{i}.{norm}.weight"),
        ("norm.scale", "model.norm.weight"),
        ("lm_head.kernel", "lm_head.weight"),
    ),
    # Old checkpoints store these tables, which are computed here.
    ignored=("model.rotary_emb.inv_freq", "model.layers.{i}.self_attn.rotary_emb.inv_freq"),
    gguf=GGUF(
        architecture="llama",
        names=(
            ("blk.{i}.attn_q.{leaf}", "model.layers.{i}.self_attn.q_proj.{leaf}"),
            ("blk.{i}.attn_k.{leaf}", "model.layers.{i}.self_attn.k_proj.{leaf}"),
            ("blk.{i}.attn_v.{leaf}", "model.layers.{i}.self_attn.v_proj.{leaf}"),
            ("blk.{i}.attn_output.{leaf}", "model.layers.{i}.self_attn.o_proj.{leaf}"),
            ("blk.{i}.ffn_gate.{leaf}", "model.layers.{i}.mlp.gate_proj.{leaf}"),
            ("blk.{i}.ffn_up.{leaf}", "model.layers.{i}.mlp.up_proj.{leaf}"),
            ("blk.{i}.ffn_down.{leaf}", "model.layers.{i}.mlp.down_proj.{leaf}"),
            ("blk.{i}.attn_norm.{leaf}", "model.layers.{i}.input_layernorm.{leaf}"),
            ("blk.{i}.ffn_norm.{leaf}", "model.layers.{i}.post_attention_layernorm.{leaf}"),
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output_norm.weight", "model.norm.weight"),
            ("output.weight", "lm_head.weight"),
        ),
        read_config=from_gguf,
        heads=(
            ("blk.{i}.attn_q.{leaf}", "num_attention_heads"),
            ("blk.{i}.attn_k.{leaf}", "num_key_value_heads"),
        ),
        # Read with the config.
        ignored=(ROPE_FACTORS,),
    ),
)
"""Llama 2, 3, 3.1, 3.2 and models of their shape, such as SmolLM2."""
