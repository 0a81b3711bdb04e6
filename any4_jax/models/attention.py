"""The attention of decoders with rotary positions.

Letters: B rows, T tokens, E hidden size (the embedding), H / Hkv heads, D head size.
"""

from collections.abc import Callable
from typing import Protocol

import jax
from flax import nnx

from any4_jax.kv_cache import AttentionSettings, Cache, Rope, append_attend
from any4_jax.models.base import Site, Tap, no_tap
from any4_jax.models.layers import Layers, heads
from any4_jax.nn.nnx import call_each


class AttentionConfig(Protocol):
    """The fields of a config that its attention depends on; see `any4_jax.models.config.LlamaConfig`."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def attention_bias(self) -> bool: ...
    @property
    def output_bias(self) -> bool: ...
    @property
    def qk_norm(self) -> bool: ...
    def rope(self, index: int) -> Rope | None: ...
    def attention(self, index: int) -> AttentionSettings: ...


class Attention(nnx.Module):
    """Grouped-query attention (arXiv:2305.13245); the cache stores keys and values, masks and attends.

    Attributes:
        q_proj, k_proj, v_proj, o_proj: the linears.
        q_norm, k_norm: norms over the D channels of each head, before the rotation; absent unless the config says
            `qk_norm`.
        head_dim, rope, settings: static.
    """

    def __init__(
        self, config: AttentionConfig, index: int, layers: Layers, norm: Callable[[int], nnx.Module] | None = None
    ) -> None:
        """The attention of block `index`; `norm` creates a norm over a number of channels."""
        hidden, size = config.hidden_size, config.head_dim
        query, shared = config.num_attention_heads * size, config.num_key_value_heads * size
        self.head_dim, self.repeat = size, query // shared
        self.rope, self.settings = config.rope(index), config.attention(index)
        self.q_proj = layers.linear(hidden, query, bias=config.attention_bias)
        self.k_proj = layers.linear(hidden, shared, bias=config.attention_bias)
        self.v_proj = layers.linear(hidden, shared, bias=config.attention_bias)
        self.o_proj = layers.linear(query, hidden, bias=config.output_bias)
        if config.qk_norm and norm is not None:
            self.q_norm, self.k_norm = norm(size), norm(size)

    def sites(self, path: str, after: str) -> tuple[Site, ...]:
        """The sites of this attention at `path` in a block; `after` is the path of the norm before it."""
        q, k, v, o = (f"{path}.{name}_proj" for name in "qkvo")
        return Site("attn_in", (q, k, v), after), Site("attn_out", (o,), v, self.repeat, self.head_dim)

    def __call__(self, x: jax.Array, cache: Cache, positions: jax.Array, tap: Tap = no_tap) -> tuple[jax.Array, Cache]:
        """x [B, T, E] and positions int32 [B, T] -> ([B, T, E], the cache with these tokens added)."""
        tap("attn_in", x)
        queries, keys, values = (heads(y, self.head_dim) for y in call_each((self.q_proj, self.k_proj, self.v_proj), x))
        if hasattr(self, "q_norm"):
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        with jax.named_scope("attention"):
            mixed, cache = append_attend(cache, queries, keys, values, positions, self.rope, self.settings)
        mixed = mixed.reshape(*mixed.shape[:2], -1)
        tap("attn_out", mixed)
        return self.o_proj(mixed), cache
