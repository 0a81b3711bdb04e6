"""The configs of the Llama family and of families with its blocks, with the names of Hugging Face's `config.json`."""

import dataclasses

from any4_jax.kv_cache import PLAIN, AttentionSettings
from any4_jax.models.rope import Rope
from any4_jax.models.rope_scaling import AnyScaling, RopeScaling
from any4_jax.schema import Count, Index, Positive

__all__ = ["LlamaConfig", "RopeScaling", "WindowedConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Every number that the Llama family's forward pass depends on; hashable, so it can be static under jit.

    The config of a family with such blocks is a subclass, which overrides what differs.

    Raises:
        ValueError: num_attention_heads is no multiple of num_key_value_heads, head_dim is odd, or rope_scaling has
            another number of factors than there are frequencies.
    """

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    max_position_embeddings: Count
    rms_norm_eps: Positive = 1e-5
    rope_theta: Positive = 10000.0
    rope_scaling: AnyScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: Index | None = None
    eos_token_ids: tuple[Index, ...] = ()

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, and an even number is needed to rotate pairs of channels")
        scaling, frequencies = self.rope_scaling, self.head_dim // 2
        if scaling is not None and set(scaling.made_for) - {frequencies}:
            raise ValueError(
                f"{scaling.rope_type} rope scaling has {' and '.join(map(str, scaling.made_for))} factors, and "
                f"{frequencies} of each kind are needed for head_dim={self.head_dim}"
            )

    @property
    def output_bias(self) -> bool:
        """Whether the output projection of attention has a bias; `attention_bias` is of the other three."""
        return self.attention_bias

    @property
    def qk_norm(self) -> bool:
        """Whether each head of queries and keys is normalized before it is rotated."""
        return False

    def rope(self, index: int) -> Rope:
        """The rope of a block."""
        return Rope(self.head_dim, self.rope_theta, self.rope_scaling)

    def attention(self, index: int) -> AttentionSettings:
        """How a block attends."""
        return PLAIN


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowedConfig(LlamaConfig):
    """The config of a family some of whose blocks see only the last tokens.

    Attributes:
        windows: how many tokens each block sees, its own included; None means all. Empty means all in every block.

    Raises:
        ValueError: there are windows for another number of blocks.
    """

    windows: tuple[Count | None, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.windows and len(self.windows) != self.num_hidden_layers:
            raise ValueError(f"there are {len(self.windows)} windows for num_hidden_layers={self.num_hidden_layers}")

    def window(self, index: int) -> int | None:
        """How many tokens a block sees; None means all."""
        return self.windows[index] if self.windows else None

    def attention(self, index: int) -> AttentionSettings:
        return AttentionSettings(window=self.window(index))
