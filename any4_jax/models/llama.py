"""The Llama family (Llama 2, 3, 3.1, 3.2 and models of their shape) as Flax NNX modules.

Attribute paths are the names in Hugging Face checkpoints without the leading "model.", such as
`layers.3.self_attn.q_proj`.
Linears are `nnx.Linear` with kernels [in, out]; surgery may replace one by any module that is called in the same way.
Letters: B rows, T tokens, E hidden size (the embedding), V vocabulary, H / Hkv heads, D head size.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from any4_jax.kv_cache import Cache
from any4_jax.models.base import PRECISION, Decoder, Site, Tap, no_tap
from any4_jax.models.config import LlamaConfig
from any4_jax.models.norms import RMSNorm
from any4_jax.models.rope import Rope
from any4_jax.nn.nnx import call_each


class Attention(nnx.Module):
    """Grouped-query attention (arXiv:2305.13245); the cache stores keys and values, masks and attends."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            bias = config.attention_bias
            return nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.config = config
        hidden, size = config.hidden_size, config.head_dim
        self.q_proj = linear(hidden, config.num_attention_heads * size)
        self.k_proj = linear(hidden, config.num_key_value_heads * size)
        self.v_proj = linear(hidden, config.num_key_value_heads * size)
        self.o_proj = linear(config.num_attention_heads * size, hidden)

    def __call__(self, x: jax.Array, cache: Cache, positions: jax.Array, tap: Tap = no_tap) -> tuple[jax.Array, Cache]:
        """x [B, T, E] and positions int32 [B, T] -> ([B, T, E], the cache with these tokens added)."""
        rope = Rope.of(self.config)

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], -1, self.config.head_dim)

        tap("attn_in", x)
        queries, keys, values = map(heads, call_each((self.q_proj, self.k_proj, self.v_proj), x))
        cache = cache.append(keys, values, positions, rope)
        mixed = cache.attend(queries, positions, rope)
        mixed = mixed.reshape(*mixed.shape[:2], -1)
        tap("attn_out", mixed)
        return self.o_proj(mixed), cache


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, arXiv:2002.05202, eq. 6)."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            bias = config.mlp_bias
            return nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array, tap: Tap = no_tap) -> jax.Array:
        """x [B, T, E] -> [B, T, E]."""
        tap("mlp_in", x)
        gate, up = call_each((self.gate_proj, self.up_proj), x)
        inner = jax.nn.silu(gate) * up
        tap("mlp_out", inner)
        return self.down_proj(inner)


class Block(nnx.Module):
    """One block. Blocks of one shape have equal graph definitions, so they share one program."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps=eps, param_dtype=param_dtype)
        self.self_attn = Attention(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(size, eps=eps, param_dtype=param_dtype)
        self.mlp = MLP(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, cache: Cache, positions: jax.Array, tap: Tap | None = None
    ) -> tuple[jax.Array, Cache]:
        """x [B, T, E] and positions int32 [B, T] -> ([B, T, E], the cache with these tokens added).

        `tap` is called with the input of each site of `Llama.sites`.
        """
        tap = tap or no_tap
        with jax.default_matmul_precision(PRECISION):
            mixed, cache = self.self_attn(self.input_layernorm(x), cache, positions, tap)
            x = x + mixed
            return x + self.mlp(self.post_attention_layernorm(x), tap), cache


class Llama(Decoder):
    """A model of the Llama family; see `Decoder`.

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
        param_dtype = dtype if param_dtype is None else param_dtype
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.layers = nnx.List(
            Block(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, param_dtype=param_dtype)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

    def sites(self, index: int) -> tuple[Site, ...]:
        """The sites of a block, which are the same for all blocks."""
        repeat = self.config.num_attention_heads // self.config.num_key_value_heads
        return (
            Site("attn_in", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
            Site("attn_out", ("self_attn.o_proj",), "self_attn.v_proj", repeat, self.config.head_dim),
            Site("mlp_in", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
            Site("mlp_out", ("mlp.down_proj",), "mlp.up_proj"),
        )

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
        with jax.default_matmul_precision(PRECISION):
            logits = self.embed_tokens.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)
        return logits.astype(jnp.float32)
