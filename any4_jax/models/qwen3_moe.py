"""Qwen3-MoE (arXiv:2505.09388): Qwen3 with a mixture of experts in most blocks."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from any4_jax.models.experts import MoE
from any4_jax.models.family import GGUF, Family
from any4_jax.models.gguf_config import ADVICE, metadata
from any4_jax.models.gguf_config import build as build_from_gguf
from any4_jax.models.gguf_file import GGUFFile
from any4_jax.models.hf_config import build, read
from any4_jax.models.layers import Layers
from any4_jax.models.llama import Llama
from any4_jax.models.llama_config import SILU
from any4_jax.models.llama_family import GGUF_NAMES, IGNORED, NAMES
from any4_jax.models.mlp import MLP
from any4_jax.models.qwen import Qwen3Config, QwenFile, windows_of
from any4_jax.schema import Count, Index


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoEConfig(Qwen3Config):
    """The config of a Qwen3-MoE.

    Attributes:
        num_experts: X.
        num_experts_per_tok: how many of them a token reaches.
        moe_intermediate_size: F of an expert; `intermediate_size` is that of a block without experts.
        norm_topk_prob: whether the weights of a token's experts sum to 1.
        dense: the blocks without experts.

    Raises:
        ValueError: a token would reach more experts than there are.
    """

    num_experts: Count
    num_experts_per_tok: Count
    moe_intermediate_size: Count
    norm_topk_prob: bool = False
    dense: tuple[Index, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, and at most num_experts={self.num_experts} is "
                "needed"
            )


class Qwen3MoEFile(QwenFile):
    """config.json, with the defaults of transformers' Qwen3MoeConfig.

    Attributes:
        num_local_experts: what transformers 5 writes in place of num_experts.
        max_window_layers: transformers ignores it here: if there is a window, all blocks have it.
    """

    num_key_value_heads: Count | None = 4
    num_experts: Count = 128
    num_local_experts: Count | None = None
    num_experts_per_tok: Count = 8
    moe_intermediate_size: Count = 768
    norm_topk_prob: bool = False
    decoder_sparse_step: Count = 1
    mlp_only_layers: tuple[Index, ...] | None = None


class Qwen3MoE(Llama):
    """A Qwen3-MoE; see `Llama`."""

    config: Qwen3MoEConfig

    def new_mlp(self, index: int, layers: Layers) -> nnx.Module:
        c = self.config
        if index in c.dense:
            return MLP(c, layers)
        return MoE(
            c.hidden_size,
            c.moe_intermediate_size,
            c.num_experts,
            layers,
            top=c.num_experts_per_tok,
            normalized=c.norm_topk_prob,
        )


def _from_hf(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> Qwen3MoEConfig:
    file = read(Qwen3MoEFile, {**config, "max_window_layers": 0})
    step, only = file.decoder_sparse_step, file.mlp_only_layers or ()
    return build(
        Qwen3MoEConfig,
        file,
        generation,
        SILU,
        windows=windows_of(file),
        num_experts=file.num_local_experts or file.num_experts,
        num_experts_per_tok=file.num_experts_per_tok,
        moe_intermediate_size=file.moe_intermediate_size,
        norm_topk_prob=file.norm_topk_prob,
        dense=tuple(i for i in range(file.num_hidden_layers) if i in only or (i + 1) % step),
    )


def _from_gguf(file: GGUFFile) -> Qwen3MoEConfig:
    said = metadata(file)
    if said.experts is None or said.used_experts is None or said.expert_size is None:
        raise ValueError(
            f"{file.path} lacks expert_used_count or expert_feed_forward_length of {file.architecture}; {ADVICE}"
        )
    return build_from_gguf(
        Qwen3MoEConfig,
        file,
        said,
        num_experts=said.experts,
        num_experts_per_tok=said.used_experts,
        moe_intermediate_size=said.expert_size,
        # llama.cpp normalizes the weights of this architecture.
        norm_topk_prob=True,
        dense=tuple(i for i in range(said.num_hidden_layers) if f"blk.{i}.ffn_gate_inp.weight" not in file),
    )


_MLP = "model.layers.{i}.mlp"

QWEN3_MOE = Family(
    name="qwen3_moe",
    module=Qwen3MoE,
    config=Qwen3MoEConfig,
    architectures=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    read_config=_from_hf,
    names=(
        ("layers.{i}.mlp.router.kernel", _MLP + ".gate.weight"),
        ("layers.{i}.mlp.experts.{linear}_proj.kernel", _MLP + ".experts.{expert}.{linear}_proj.weight"),
        *NAMES,
    ),
    ignored=IGNORED,
    gguf=GGUF(
        architecture="qwen3moe",
        experts=True,
        names=(
            *GGUF_NAMES,
            ("blk.{i}.ffn_gate_inp.weight", _MLP + ".gate.weight"),
            ("blk.{i}.ffn_gate_exps.weight", _MLP + ".experts.gate_proj.weight"),
            ("blk.{i}.ffn_up_exps.weight", _MLP + ".experts.up_proj.weight"),
            ("blk.{i}.ffn_down_exps.weight", _MLP + ".experts.down_proj.weight"),
        ),
        read_config=_from_gguf,
    ),
)
"""Qwen3-30B-A3B, Qwen3-235B-A22B and models of their shape."""
