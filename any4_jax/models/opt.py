"""OPT (arXiv:2205.01068): learned positions, LayerNorm, biases everywhere, an MLP without a gate.

Letters: B rows, T tokens, E hidden size, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from any4_jax.kv_cache import PLAIN, AttentionSettings, Cache
from any4_jax.models.attention import Attention
from any4_jax.models.base import PRECISION, Decoder, Site, Tap, no_tap
from any4_jax.models.layers import Layers
from any4_jax.schema import Count, Index, Name

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}

# The first rows of the table of positions belong to padding.
_OFFSET = 2
_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig:
    """Every number that OPT's forward pass depends on, with the names of Hugging Face's config.json.

    Attributes:
        word_embed_proj_dim: channels of the embedding; if they are not E, a linear leads to E and one back.
        do_layer_norm_before: whether norms are before attention and MLP; else they are after the residual sums.
        final_norm: whether a norm follows the last block.
        affine: whether norms have scales and biases.

    Raises:
        ValueError: hidden_size is no multiple of num_attention_heads.
    """

    vocab_size: Count
    hidden_size: Count
    ffn_dim: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    max_position_embeddings: Count
    word_embed_proj_dim: Count
    do_layer_norm_before: bool = True
    final_norm: bool = True
    affine: bool = True
    enable_bias: bool = True
    activation_function: Name = "relu"
    tie_word_embeddings: bool = True
    bos_token_id: Index | None = None
    eos_token_ids: tuple[Index, ...] = ()

    qk_norm = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def attention_bias(self) -> bool:
        return self.enable_bias

    @property
    def output_bias(self) -> bool:
        return self.enable_bias

    def rope(self, index: int) -> None:
        """None: positions are learned."""

    def attention(self, index: int) -> AttentionSettings:
        """Plain in every block."""
        return PLAIN


class OPTBlock(nnx.Module):
    """One block."""

    def __init__(self, config: OPTConfig, index: int, layers: Layers) -> None:
        size, inner, bias = config.hidden_size, config.ffn_dim, config.enable_bias
        self.before, self.activation = config.do_layer_norm_before, ACTIVATIONS[config.activation_function]
        self.self_attn = Attention(config, index, layers)
        self.self_attn_layer_norm = layers.layer_norm(size, eps=_EPSILON, affine=config.affine)
        self.fc1 = layers.linear(size, inner, bias=bias)
        self.fc2 = layers.linear(inner, size, bias=bias)
        self.final_layer_norm = layers.layer_norm(size, eps=_EPSILON, affine=config.affine)

    def sites(self) -> tuple[Site, ...]:
        """The sites of the block. A norm after a residual sum is read by the next sum too, so no site names it; and
        fc1 is no site's `after`, because a negative factor doesn't pass the activation."""
        attention = self.self_attn.sites("self_attn", "self_attn_layer_norm")
        if not self.before:
            attention = (dataclasses.replace(attention[0], after=None), *attention[1:])
        return (
            *attention,
            Site("mlp_in", ("fc1",), "final_layer_norm" if self.before else None),
            Site("mlp_out", ("fc2",), None),
        )

    def __call__(
        self, x: jax.Array, cache: Cache, positions: jax.Array, tap: Tap | None = None
    ) -> tuple[jax.Array, Cache]:
        """x [B, T, E] and positions int32 [B, T] -> ([B, T, E], the cache with these tokens added)."""
        tap = tap or no_tap
        with jax.default_matmul_precision(PRECISION):
            mixed, cache = self.self_attn(self.self_attn_layer_norm(x) if self.before else x, cache, positions, tap)
            x = x + mixed
            x = x if self.before else self.self_attn_layer_norm(x)
            inside = self.final_layer_norm(x) if self.before else x
            tap("mlp_in", inside)
            inner = self.activation(self.fc1(inside))
            tap("mlp_out", inner)
            x = x + self.fc2(inner)
            return x if self.before else self.final_layer_norm(x), cache


class OPT(Decoder):
    """An OPT; see `Decoder`.

    Attributes:
        embed_tokens, embed_positions: tables.
        project_in, project_out: linears between the embedding's channels and E; absent if they are equal.
        final_layer_norm: absent unless the config says `final_norm`.
        lm_head: the head; absent if it is tied to the embedding.
    """

    config: OPTConfig

    def __init__(
        self,
        config: OPTConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates random weights; see `Llama`."""
        super().__init__(config, dtype=dtype)
        layers = Layers.of(dtype, param_dtype, rngs)
        size, narrow = config.hidden_size, config.word_embed_proj_dim
        self.embed_tokens = layers.embed(config.vocab_size, narrow)
        self.embed_positions = layers.embed(config.max_position_embeddings + _OFFSET, size)
        if narrow != size:
            self.project_in, self.project_out = layers.linear(narrow, size), layers.linear(size, narrow)
        self.layers = nnx.List(OPTBlock(config, index, layers) for index in range(config.num_hidden_layers))
        if config.final_norm:
            self.final_layer_norm = layers.layer_norm(size, eps=_EPSILON, affine=config.affine)
        if not config.tie_word_embeddings:
            self.lm_head = layers.linear(narrow, config.vocab_size)

    def sites(self, index: int) -> tuple[Site, ...]:
        """The sites of a block."""
        sites: tuple[Site, ...] = self.layers[index].sites()
        return sites

    @property
    def head_site(self) -> Site:
        """`lm_head`, or the embedding; what precedes it is no norm alone."""
        return Site("head_in", ("embed_tokens",) if self.config.tie_word_embeddings else ("lm_head",), None)

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """int32 tokens and positions [B, T] -> [B, T, E]."""
        x = self.embed_tokens(tokens)
        if hasattr(self, "project_in"):
            with jax.default_matmul_precision(PRECISION):
                x = self.project_in(x)
        return x + self.embed_positions(jnp.maximum(positions, -1) + _OFFSET)

    def head_input(self, x: jax.Array) -> jax.Array:
        """The final norm and the way back to the embedding's channels, as far as the model has them."""
        x = self.final_layer_norm(x) if hasattr(self, "final_layer_norm") else x
        if not hasattr(self, "project_out"):
            return x
        with jax.default_matmul_precision(PRECISION):
            return self.project_out(x)

    def head(self, x: jax.Array) -> jax.Array:
        """[B, T, E] -> float32 logits [B, T, V]."""
        x = self.head_input(x)
        with jax.default_matmul_precision(PRECISION), jax.named_scope("head"):
            head: Any = self.embed_tokens.attend if self.config.tie_word_embeddings else self.lm_head
            return head(x).astype(jnp.float32)
