"""What KVQuant keeps of one block, and attention over it; `any4_jax.kv_cache.kvquant` says how it is stored."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from any4_jax.choice import Backend, Choice
from any4_jax.kv_cache import one_token
from any4_jax.kv_cache.attention import BLOCK_SLOTS
from any4_jax.kv_cache.base import Rope, rotated
from any4_jax.kv_cache.blocks import Part, ReadBlock, attention_over
from any4_jax.kv_cache.by_token import leaving
from any4_jax.kv_cache.kvquant_step import BACKENDS
from any4_jax.kv_cache.nonuniform import Levels, TokenCodes, decode_keys, decode_values, encode_keys, encode_values
from any4_jax.kv_cache.ring import Recent, with_first
from any4_jax.kv_cache.ring_cache import RingCache
from any4_jax.kv_cache.settings import AttentionSettings
from any4_jax.pytree import register_dataclass


@register_dataclass
@dataclasses.dataclass(frozen=True)
class KVQuantCache(RingCache):
    """Keys and values of one block; `kv_cache.base` says what the letters mean.

    A token is stored by its position, not by its slot: so a row of a ragged batch is stored as it would be alone. Keys
    are stored before their rotation.

    Attributes:
        levels: of the block.
        keys, values: codes of P positions, [B, ...]; the first n - R of a row's n tokens.
        first_keys, first_values: [B, Hkv, N, D], the first N tokens of each row.
        recent_keys, recent_values: [B, Hkv, R, D], the newest R tokens; see `kv_cache.ring`.
        length: int32 scalar, the slots in use.
        start: int32 [B], the first slot of each row that holds no padding.
        slots: S (static).
        block: how many positions are decoded at a time (static); P is a multiple of it.
        bits: of the codes (static).
    """

    levels: Levels
    keys: TokenCodes
    values: TokenCodes
    first_keys: jax.Array
    first_values: jax.Array
    recent_keys: jax.Array
    recent_values: jax.Array
    length: jax.Array
    start: jax.Array
    slots: int = dataclasses.field(metadata=dict(static=True))
    block: int = dataclasses.field(metadata=dict(static=True))
    bits: int = dataclasses.field(metadata=dict(static=True))

    def choice(
        self, queries: jax.Array, keys: jax.Array, rope: Rope | None, settings: AttentionSettings
    ) -> tuple[Choice[Backend], tuple[Any, ...]]:
        """See `Cache`."""
        return BACKENDS, (self, queries, keys, rope, settings)

    def reader(self, *of: Any) -> "_Reader":
        """See `RingCache`."""
        return _Reader(self, *of)

    def with_tokens(self, keys: Recent, values: Recent) -> Self:
        """The cache with tokens that arrive."""
        rest = self.levels, self.bits, self.keys.outliers.shape[-1]
        return dataclasses.replace(
            self,
            keys=leaving(self.keys, keys, lambda x: encode_keys(x, *rest)),
            values=leaving(self.values, values, lambda x: encode_values(x, *rest)),
            first_keys=with_first(self.first_keys, keys.new, keys.arrival),
            first_values=with_first(self.first_values, values.new, values.arrival),
            recent_keys=keys.turned(),
            recent_values=values.turned(),
            length=self.length + keys.new.shape[2],
        )


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Attention over a cache, and over the tokens that are exact to some queries.

    A query is *judged* at a position p, its own or that of another token of its row: what is quantized and what exact
    to it is what the token at p would have seen. The first N tokens are exact, and so are those from p - R + 1 on.

    Attributes:
        cache: it holds all tokens.
        keys, values: those that are exact to some query.
        rope: of the keys.
        earliest: int32 [B], the lowest p of each row.
        tokens: all positions are below `earliest` + `tokens`.
    """

    cache: KVQuantCache
    keys: Recent
    values: Recent
    rope: Rope | None
    earliest: jax.Array
    tokens: int

    def attend(
        self, queries: jax.Array, positions: jax.Array, judges: jax.Array | None, settings: AttentionSettings
    ) -> jax.Array:
        """Attention of queries [B, T, H, D]; `judges` is the p of each, int32 [B, T], or None for the earliest."""
        cache, count, residual = self.cache, self.cache.first_keys.shape[2], self.keys.ring.shape[2]
        judges = self.earliest[:, None] if judges is None else judges
        positions, p = (one_token.of_rows(x, queries) for x in (positions, judges))
        oldest = jnp.zeros_like(p) if settings.window is None else jnp.maximum(positions - settings.window + 1, 0)
        later, room = jnp.maximum(oldest, count), cache.keys.outliers.shape[2]
        parts = [Part(self._coded, room, later, jnp.minimum(positions, p - residual))]
        if count:
            parts.append(Part(self._first, count, oldest, jnp.minimum(positions, count - 1)))
        if residual:
            first = (self.earliest - residual + 1)[:, None]
            near, begin = residual - 1 + self.tokens, jnp.maximum(later, p - residual + 1)
            parts.append(Part(self._near(first, near), near, begin - first, positions - first))
        return attention_over(rotated(queries, positions, self.rope), parts, settings)

    def _coded(self, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Decodes a block."""
        cache = self.cache

        def part(codes: TokenCodes) -> TokenCodes:
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, cache.block, 2), codes)

        keys = decode_keys(part(cache.keys), cache.levels, cache.bits)
        values = decode_values(part(cache.values), cache.levels, cache.bits)
        return self._read(keys, values, (first + jnp.arange(cache.block, dtype=jnp.int32))[None])

    def _first(self, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first N tokens, in one block."""
        del first
        keys, values = self.cache.first_keys, self.cache.first_values
        return self._read(keys, values, jnp.arange(keys.shape[2], dtype=jnp.int32)[None])

    def _near(self, begin: jax.Array, slots: int) -> ReadBlock:
        """Up to BLOCK_SLOTS exact tokens of the `slots` at positions from begin int32 [B, 1] on."""
        block = min(slots, BLOCK_SLOTS)

        def read(first: jax.Array) -> tuple[jax.Array, jax.Array]:
            positions = begin + first + jnp.arange(block, dtype=jnp.int32)[None]
            return self._read(self.keys.at(positions), self.values.at(positions), positions)

        return read

    def _read(self, keys: jax.Array, values: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys [B * Hkv, D, N] and values [B * Hkv, N, D] from [B, Hkv, N, D] and positions [B or 1, N]."""
        positions = jnp.broadcast_to(positions, (keys.shape[0], keys.shape[2]))
        keys = rotated(keys.swapaxes(1, 2), positions, self.rope).transpose(0, 2, 3, 1)
        return keys.reshape(-1, *keys.shape[2:]), values.reshape(-1, *values.shape[2:])
