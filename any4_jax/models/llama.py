"""The Llama family (Llama 2, 3, 3.1, 3.2 and models of their shape) as Flax NNX modules, and the base of its relatives.

Attribute paths are the names in Hugging Face checkpoints without the leading "model.", such as
`layers.3.self_attn.q_proj`.
Letters: B rows, T tokens, E hidden size (the embedding), V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from any4_jax.kv_cache import Cache
from any4_jax.models.attention import Attention
from any4_jax.models.base import PRECISION, Decoder, Site, Tap, no_tap
from any4_jax.models.config import LlamaConfig
from any4_jax.models.layers import Layers
from any4_jax.models.mlp import MLP
from any4_jax.models.norms import RMSNorm


class Block(nnx.Module):
    """One block. Blocks of one shape have equal graph definitions, so they share one program."""

    def __init__(self, config: LlamaConfig, attention: Any, mlp: Any, layers: Layers) -> None:
        """A block with its attention and its MLP."""
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps=eps, param_dtype=layers.param_dtype)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(size, eps=eps, param_dtype=layers.param_dtype)
        self.mlp = mlp

    def sites(self) -> tuple[Site, ...]:
        """The sites of the block, in the order in which they run."""
        attention: tuple[Site, ...] = self.self_attn.sites("self_attn", "input_layernorm")
        mlp: tuple[Site, ...] = self.mlp.sites("mlp", "post_attention_layernorm")
        return attention + mlp

    def __call__(
        self, x: jax.Array, cache: Cache, positions: jax.Array, tap: Tap | None = None
    ) -> tuple[jax.Array, Cache]:
        """x [B, T, E] and positions int32 [B, T] -> ([B, T, E], the cache with these tokens added).

        `tap` is called with the input of each site.
        """
        tap = tap or no_tap
        with jax.default_matmul_precision(PRECISION):
            mixed, cache = self.self_attn(self.input_layernorm(x), cache, positions, tap)
            x = x + mixed
            return x + self.mlp(self.post_attention_layernorm(x), tap), cache


class Llama(Decoder):
    """A model of the Llama family; see `Decoder`. A family with such blocks overrides the methods that create them.

    Attributes:
        embed_tokens, layers, norm: the embedding, the blocks, the final norm.
        lm_head: the head; absent if it is tied to the embedding.
    """

    config: LlamaConfig

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates random weights; `nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))` allocates none.

        Args:
            config: the shape of the model.
            dtype: of activations, and of the cache unless another is asked for.
            param_dtype: of the weights; None means `dtype`.
            rngs: the source of the random weights.
        """
        super().__init__(config, dtype=dtype)
        layers = Layers.of(dtype, param_dtype, rngs)
        self.embed_tokens = layers.embed(config.vocab_size, config.hidden_size)
        self.layers = nnx.List(self.new_block(index, layers) for index in range(config.num_hidden_layers))
        self.norm = self.new_norm(config.hidden_size, layers)
        if not config.tie_word_embeddings:
            self.lm_head = layers.linear(config.hidden_size, config.vocab_size)

    def new_norm(self, size: int, layers: Layers) -> nnx.Module:
        """A norm over `size` channels."""
        return RMSNorm(size, eps=self.config.rms_norm_eps, param_dtype=layers.param_dtype)

    def new_block(self, index: int, layers: Layers) -> nnx.Module:
        """The block of an index."""
        attention = Attention(self.config, index, layers, lambda size: self.new_norm(size, layers))
        return Block(self.config, attention, self.new_mlp(index, layers), layers)

    def new_mlp(self, index: int, layers: Layers) -> nnx.Module:
        """The MLP of a block."""
        return MLP(self.config, layers)

    def sites(self, index: int) -> tuple[Site, ...]:
        """The sites of a block."""
        sites: tuple[Site, ...] = self.layers[index].sites()
        return sites

    @property
    def head_site(self) -> Site:
        """`lm_head`, after the final norm. A tied embedding has no `after`: embedding tokens reads its columns too."""
        tied = self.config.tie_word_embeddings
        return Site("head_in", ("embed_tokens",), None) if tied else Site("head_in", ("lm_head",), "norm")

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """int32 tokens [B, T] -> [B, T, E]; ignores the positions."""
        return self.embed_tokens(tokens)

    def head_input(self, x: jax.Array) -> jax.Array:
        """The final norm: [B, T, E] -> [B, T, E]."""
        return self.norm(x)

    def head(self, x: jax.Array) -> jax.Array:
        """The final norm and the head: [B, T, E] -> float32 logits [B, T, V]."""
        x = self.head_input(x)
        with jax.default_matmul_precision(PRECISION), jax.named_scope("head"):
            logits = self.embed_tokens.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)
        return logits.astype(jnp.float32)
