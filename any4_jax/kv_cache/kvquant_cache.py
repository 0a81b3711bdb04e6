"""What KVQuant keeps of one block, and attention over it; `any4_jax.kv_cache.kvquant` says how it is stored."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from any4_jax.choice import Backend, Choice
from any4_jax.kv_cache.attention import BLOCK_SLOTS
from any4_jax.kv_cache.base import Rope, rotated
from any4_jax.kv_cache.blocks import Part, ReadBlock, attention_over
from any4_jax.kv_cache.by_token import leaving
from any4_jax.kv_cache.kvquant_step import BACKENDS, step
from any4_jax.kv_cache.nonuniform import Levels, TokenCodes, decode_keys, decode_values, encode_keys, encode_values
from any4_jax.kv_cache.plain import check_fits
from any4_jax.kv_cache.ring import Arrival, Recent, with_first
from any4_jax.kv_cache.settings import PLAIN, AttentionSettings
from any4_jax.pytree import register_dataclass


@register_dataclass
@dataclasses.dataclass(frozen=True)
class KVQuantCache:
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

    def append(self, keys: jax.Array, values: jax.Array, positions: jax.Array, rope: Rope | None) -> Self:
        """Add keys and values [B, T, Hkv, D].

        Raises:
            ValueError: T exceeds the number of slots.
        """
        del positions, rope  # keys are rotated when they are read
        return self._with(*self._arriving(keys, values))

    def attend(
        self, queries: jax.Array, positions: jax.Array, rope: Rope | None, settings: AttentionSettings = PLAIN
    ) -> jax.Array:
        """Attention of queries [B, T, H, D] over what is quantized and what is exact for the newest token."""
        count = jnp.maximum(self.length - self.start, 0)
        # Nothing arrives, and the rings hold all that is exact.
        arrival = Arrival(count, count, jnp.zeros_like(count))
        keys, values = (Recent(ring, ring, arrival) for ring in (self.recent_keys, self.recent_values))
        reader = _Reader(self, keys, values, rope, count - 1, 1)
        return reader.attend(queries, positions, (count - 1)[:, None], settings)

    def append_attend(
        self,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        positions: jax.Array,
        rope: Rope | None,
        settings: AttentionSettings = PLAIN,
    ) -> tuple[jax.Array, Self]:
        """`append`, then attention of the new tokens: each sees what it would see if they came one by one.

        One token a row is a `kvquant_step.step`, by the first of its `BACKENDS` that can.

        Raises:
            ValueError: T exceeds the number of slots.
        """
        if keys.shape[1] == 1:
            return step(self, queries, keys, values, positions, rope=rope, settings=settings)
        recent = self._arriving(keys, values)
        cache = self._with(*recent)
        reader = _Reader(cache, *recent, rope, recent[0].arrival.before, keys.shape[1])
        return reader.attend(queries, positions, positions, settings), cache

    def choice(
        self, queries: jax.Array, keys: jax.Array, rope: Rope | None, settings: AttentionSettings
    ) -> tuple[Choice[Backend], tuple[Any, ...]]:
        """See `Cache`."""
        return BACKENDS, (self, queries, keys, rope, settings)

    def _arriving(self, keys: jax.Array, values: jax.Array) -> tuple[Recent, Recent]:
        check_fits(keys.shape[1], self.slots)
        arrival, dtype = Arrival.of(self.length, self.start, keys.shape[1]), self.recent_keys.dtype
        new = (x.transpose(0, 2, 1, 3).astype(dtype) for x in (keys, values))
        rings = self.recent_keys, self.recent_values
        first, second = (Recent(ring, x, arrival) for ring, x in zip(rings, new, strict=True))
        return first, second

    def _with(self, keys: Recent, values: Recent) -> Self:
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
        self, queries: jax.Array, positions: jax.Array, judges: jax.Array, settings: AttentionSettings
    ) -> jax.Array:
        """Attention of queries [B, T, H, D]; `judges` is the p of each, int32 [B, T]."""
        cache, count, residual = self.cache, self.cache.first_keys.shape[2], self.keys.ring.shape[2]
        # Other caches take what broadcasts, and integers of 64 bits.
        positions, p = (jnp.broadcast_to(x, queries.shape[:2]).astype(jnp.int32) for x in (positions, judges))
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
