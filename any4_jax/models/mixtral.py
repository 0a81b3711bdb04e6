"""Mixtral (arXiv:2401.04088): Mistral with a mixture of experts in each block."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from any4_jax.models.config import WindowedConfig
from any4_jax.models.experts import MoE
from any4_jax.models.family import GGUF, Family
from any4_jax.models.gguf_config import ADVICE, ROPE_FACTORS, metadata
from any4_jax.models.gguf_config import build as build_from_gguf
from any4_jax.models.gguf_file import GGUFFile
from any4_jax.models.hf_config import build, read
from any4_jax.models.layers import Layers
from any4_jax.models.llama import Llama
from any4_jax.models.llama_config import SILU
from any4_jax.models.llama_family import GGUF_ATTENTION, GGUF_HEADS, GGUF_NORMS, GGUF_OUTSIDE, IGNORED, NAMES
from any4_jax.models.mistral import MistralFile, windows_of
from any4_jax.schema import Count, Positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtralConfig(WindowedConfig):
    """The config of a Mixtral.

    Attributes:
        num_local_experts: X.
        num_experts_per_tok: how many of them a token reaches.

    Raises:
        ValueError: a token would reach more experts than there are.
    """

    num_local_experts: Count
    num_experts_per_tok: Count

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, and at most num_local_experts="
                f"{self.num_local_experts} is needed"
            )


class MixtralFile(MistralFile):
    """config.json, with the defaults of transformers' MixtralConfig."""

    sliding_window: Count | None = None
    rms_norm_eps: Positive = 1e-5
    rope_theta: Positive = 1e6
    num_local_experts: Count = 8
    num_experts_per_tok: Count = 2


class Mixtral(Llama):
    """A Mixtral; see `Llama`."""

    config: MixtralConfig

    def new_mlp(self, index: int, layers: Layers) -> nnx.Module:
        c = self.config
        return MoE(
            c.hidden_size,
            c.intermediate_size,
            c.num_local_experts,
            layers,
            top=c.num_experts_per_tok,
            normalized=True,
        )


def _from_hf(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> MixtralConfig:
    file = read(MixtralFile, config)
    return build(
        MixtralConfig,
        file,
        generation,
        SILU,
        windows=windows_of(file),
        num_local_experts=file.num_local_experts,
        num_experts_per_tok=file.num_experts_per_tok,
    )


def _from_gguf(file: GGUFFile) -> MixtralConfig:
    said = metadata(file)
    if said.experts is None or said.used_experts is None:
        raise ValueError(f"{file.path} lacks {file.architecture}.expert_used_count; {ADVICE}")
    return build_from_gguf(
        MixtralConfig, file, said, num_local_experts=said.experts, num_experts_per_tok=said.used_experts
    )


_MOE = "model.layers.{i}.block_sparse_moe"

MIXTRAL = Family(
    name="mixtral",
    module=Mixtral,
    config=MixtralConfig,
    architectures=("MixtralForCausalLM",),
    model_types=("mixtral",),
    read_config=_from_hf,
    names=(
        ("layers.{i}.mlp.router.kernel", _MOE + ".gate.weight"),
        ("layers.{i}.mlp.experts.gate_proj.kernel", _MOE + ".experts.{expert}.w1.weight"),
        ("layers.{i}.mlp.experts.up_proj.kernel", _MOE + ".experts.{expert}.w3.weight"),
        ("layers.{i}.mlp.experts.down_proj.kernel", _MOE + ".experts.{expert}.w2.weight"),
        *NAMES,
    ),
    ignored=IGNORED,
    gguf=GGUF(
        architecture="llama",
        experts=True,
        names=(
            *GGUF_ATTENTION,
            *GGUF_NORMS,
            *GGUF_OUTSIDE,
            ("blk.{i}.ffn_gate_inp.weight", _MOE + ".gate.weight"),
            ("blk.{i}.ffn_gate_exps.weight", _MOE + ".experts.w1.weight"),
            ("blk.{i}.ffn_up_exps.weight", _MOE + ".experts.w3.weight"),
            ("blk.{i}.ffn_down_exps.weight", _MOE + ".experts.w2.weight"),
        ),
        read_config=_from_gguf,
        heads=GGUF_HEADS,
        ignored=(ROPE_FACTORS,),
    ),
)
"""Mixtral 8x7B, 8x22B and models of their shape."""
