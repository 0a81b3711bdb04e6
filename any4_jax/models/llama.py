"""The Llama family (Llama 2, 3, 3.1, 3.2 and models of their shape) as Flax NNX modules.

Attribute paths are the names of Hugging Face checkpoints without the leading "model.", such as
`layers.3.self_attn.q_proj`.
Linears are `nnx.Linear` with kernels [in, out]; surgery may put any module with the same call in their place.
Letters: B rows, T tokens, E hidden size (the embedding), V vocabulary, H / Hkv heads, D head size.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from any4_jax.kv_cache import Cache, CacheFactory, DenseCache
from any4_jax.models.config import LlamaConfig
from any4_jax.models.rope import Rope
from any4_jax.nn.nnx import call_each

Tap = Callable[[str, jax.Array], None]

PRECISION = "highest"
"""Of float32 products. A GPU's default, TF32, keeps 10 bits: logits are then off by 1e-3 of their scale. Products of
bfloat16 and float16 are the same either way."""


@dataclasses.dataclass(frozen=True)
class Site:
    """Linears of a block that read the same input.

    Attributes:
        name: what `tap` calls the site.
        linears: paths within the block.
        after: path of the norm or linear whose output channels are this input's channels, so that a scale per
            channel can be folded into it. After `v_proj` they coincide only where H equals Hkv.
    """

    name: str
    linears: tuple[str, ...]
    after: str


SITES = (
    Site("attn_in", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    Site("attn_out", ("self_attn.o_proj",), "self_attn.v_proj"),
    Site("mlp_in", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    Site("mlp_out", ("mlp.down_proj",), "mlp.up_proj"),
)


def _no_tap(site: str, x: jax.Array) -> None:
    """The tap that looks at nothing."""


class RMSNorm(nnx.Module):
    """x / rms(x) * scale (arXiv:1910.07467, eq. 4), the quotient in float32, rounded before the product."""

    def __init__(self, size: int, *, eps: float, param_dtype: DTypeLike) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale[...].astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention; the cache holds the keys, masks and attends."""

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

    def __call__(self, x: jax.Array, cache: Cache, positions: jax.Array, tap: Tap = _no_tap) -> tuple[jax.Array, Cache]:
        """x [B, T, E] and positions int32 [B, T] -> ([B, T, E], the cache with these tokens)."""
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

    def __call__(self, x: jax.Array, tap: Tap = _no_tap) -> jax.Array:
        """x [B, T, E] -> [B, T, E]."""
        tap("mlp_in", x)
        gate, up = call_each((self.gate_proj, self.up_proj), x)
        inner = jax.nn.silu(gate) * up
        tap("mlp_out", inner)
        return self.down_proj(inner)


class Block(nnx.Module):
    """One decoder layer. Layers of one shape have equal graph definitions, hence share one program."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps=eps, param_dtype=param_dtype)
        self.self_attn = Attention(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(size, eps=eps, param_dtype=param_dtype)
        self.mlp = MLP(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, cache: Cache, positions: jax.Array, tap: Tap | None = None
    ) -> tuple[jax.Array, Cache]:
        """x [B, T, E] and positions int32 [B, T] -> ([B, T, E], the cache with these tokens).

        `tap(site, input)` is called with the input of each of `SITES`, traced values under jit.
        """
        tap = tap or _no_tap
        with jax.default_matmul_precision(PRECISION):
            mixed, cache = self.self_attn(self.input_layernorm(x), cache, positions, tap)
            x = x + mixed
            return x + self.mlp(self.post_attention_layernorm(x), tap), cache


def block(
    graphdef: Any,
    state: Any,
    x: jax.Array,
    cache: Cache,
    positions: jax.Array,
    tap: Tap | None = None,
) -> tuple[jax.Array, Cache]:
    """`Block.__call__` as a pure function of `nnx.split(layer)`; under jit the graphdef is static."""
    return nnx.merge(graphdef, state)(x, cache, positions, tap)


# Inside a larger jit this is traced once for all layers of one shape, not once a layer.
_block = jax.jit(block, static_argnums=0)


class Llama(nnx.Module):
    """A decoder-only language model: int32 tokens [B, T] -> float32 logits [B, T, V].

    Attributes:
        config: the shape, static.
        tokenizer: a hashable tokenizer, or None; static.
        recipe: how it was quantized (any4_jax.surgery.Recipe), or None; static.
        layers: the blocks.
        embed_tokens, norm, lm_head: embedding, final norm, and head (absent where the embedding is tied).
    """

    sites: ClassVar[tuple[Site, ...]] = SITES
    block = staticmethod(block)

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Random weights. `nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))` allocates none.

        Args:
            config: the shape.
            dtype: of activations, and of the cache unless another is asked for.
            param_dtype: of the weights; None means `dtype`.
            rngs: the source of the random weights.
        """
        param_dtype = dtype if param_dtype is None else param_dtype
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.tokenizer: Any = None
        self.recipe: Any = None
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

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32 tokens [B, T] -> [B, T, E]."""
        return self.embed_tokens(tokens)

    def head(self, x: jax.Array) -> jax.Array:
        """The final norm and the head: [B, T, E] -> float32 logits [B, T, V]."""
        x = self.norm(x)
        with jax.default_matmul_precision(PRECISION):
            logits = self.embed_tokens.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)
        return logits.astype(jnp.float32)

    def init_cache(
        self,
        batch: int,
        length: int,
        *,
        start: jax.Array | None = None,
        dtype: DTypeLike | None = None,
        cache: CacheFactory = DenseCache,
    ) -> list[Cache]:
        """An empty cache of `length` slots for each layer; start int32 [B] (None: no padding)."""
        start = jnp.zeros((batch,), jnp.int32) if start is None else start
        dtype = self.dtype if dtype is None else dtype
        heads, size = self.config.num_key_value_heads, self.config.head_dim
        return [cache.create(layer, batch, length, heads, size, start, dtype) for layer in range(len(self.layers))]

    def decode(self, tokens: jax.Array, caches: list[Cache], positions: jax.Array) -> tuple[jax.Array, list[Cache]]:
        """All blocks, for use inside jit: tokens and positions int32 [B, T] -> ([B, T, E], the new caches).

        What comes out has not gone through `head`, which a caller may want for the last token only.
        """
        x, grown = self.embed(tokens), []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = _block(*nnx.split(layer), x, cache, positions)
            grown.append(cache)
        return x, grown

    def __call__(self, tokens: jax.Array | np.ndarray) -> jax.Array:
        """int32 tokens [B, T], rows without padding -> float32 logits [B, T, V]; one jitted program a shape.

        Raises:
            TypeError: tokens are no integers.
            ValueError: tokens are not [B, T] with T > 0.
        """
        tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"tokens are {tokens.dtype}, and integer token ids are needed; encode the text first")
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens have shape {tokens.shape}, and [batch, length > 0] is needed; add a batch axis")
        return _logits(self, tokens)


@jax.jit
def _logits(model: Llama, tokens: jax.Array) -> jax.Array:
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    x, _ = model.decode(tokens, model.init_cache(batch, length), positions)
    return model.head(x)
