"""KIVI (arXiv:2402.02750): keys quantized by channel, values by token, and the newest tokens as they are."""

import dataclasses
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from any4_jax.choice import Backend, Choice
from any4_jax.kv_cache.attention import BLOCK_SLOTS
from any4_jax.kv_cache.base import Rope, rotated
from any4_jax.kv_cache.blocks import Part, ReadBlock, attention_over
from any4_jax.kv_cache.codes import Codes
from any4_jax.kv_cache.kivi_slabs import KeySlab, ValueSlab
from any4_jax.kv_cache.kivi_step import BACKENDS
from any4_jax.kv_cache.ring import Recent
from any4_jax.kv_cache.ring_cache import RingCache
from any4_jax.kv_cache.settings import AttentionSettings
from any4_jax.pytree import register_dataclass


@register_dataclass
@dataclasses.dataclass(frozen=True)
class KiviCache(RingCache):
    """Keys and values of one block; `Kivi` says how they are stored, `kv_cache.base` what the letters mean.

    A token is stored by its position, not by its slot: so a row of a ragged batch is stored as it would be alone.

    Attributes:
        keys: the first n - n mod R of a row's n tokens.
        values: the first n - R.
        recent_keys, recent_values: [B, Hkv, R, D], the newest R tokens; see `kv_cache.ring`.
        length: int32 scalar, the slots in use.
        start: int32 [B], the first slot of each row that holds no padding.
        slots: S (static).
        block: how many positions are decoded at a time (static); the slab of values has room for a multiple of it.
        settings: the factory (static).
    """

    keys: KeySlab
    values: ValueSlab
    recent_keys: jax.Array
    recent_values: jax.Array
    length: jax.Array
    start: jax.Array
    slots: int = dataclasses.field(metadata=dict(static=True))
    block: int = dataclasses.field(metadata=dict(static=True))
    settings: "Kivi" = dataclasses.field(metadata=dict(static=True))

    def choice(
        self, queries: jax.Array, keys: jax.Array, rope: Rope | None, settings: AttentionSettings
    ) -> tuple[Choice[Backend], tuple[Any, ...]]:
        """See `Cache`."""
        return BACKENDS, (self, queries, keys, settings)

    def kept(self, keys: jax.Array, positions: jax.Array, rope: Rope | None) -> jax.Array:
        """Keys as they are stored."""
        return rotated(keys, positions, rope) if self.settings.rotated else keys

    def judges(self, positions: jax.Array) -> jax.Array | None:
        """See `RingCache`; as `Kivi.exact_prompt` says."""
        return None if self.settings.exact_prompt else positions

    def reader(self, *of: Any) -> "_Reader":
        """See `RingCache`."""
        return _Reader(self, *of)

    def with_tokens(self, keys: Recent, values: Recent) -> Self:
        """The cache with tokens that arrive."""
        codes = self.keys.stored(keys).codes, self.values.stored(values).codes
        return self.holding(*codes, keys.turned(), values.turned(), self.length + keys.new.shape[2])

    def holding(
        self, keys: Codes, values: Codes, recent_keys: jax.Array, recent_values: jax.Array, length: jax.Array
    ) -> Self:
        """This cache with other arrays; `start` stays."""
        return dataclasses.replace(
            self,
            keys=dataclasses.replace(self.keys, codes=keys),
            values=dataclasses.replace(self.values, codes=values),
            recent_keys=recent_keys,
            recent_values=recent_values,
            length=length,
        )


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Attention over a cache, and over tokens that are exact to some queries.

    A query is *judged* at a position p, its own or that of an earlier token of its row: what is quantized and what
    exact to it is what the token at p would have seen. Keys before p - p mod R are quantized, and values before
    p - R + 1.

    Attributes:
        cache: it holds all tokens.
        keys, values: those that are exact to some query.
        rope: of the keys.
        earliest: int32 [B], the lowest p of each row.
        tokens: all positions are below `earliest` + `tokens`.
    """

    cache: KiviCache
    keys: Recent
    values: Recent
    rope: Rope | None
    earliest: jax.Array
    tokens: int

    def attend(
        self, queries: jax.Array, positions: jax.Array, judges: jax.Array | None, settings: AttentionSettings
    ) -> jax.Array:
        """Attention of queries [B, T, H, D]; `judges` is the p of each, int32 [B, T], or None for the earliest."""
        residual, cache = self.cache.settings.residual, self.cache
        # Other caches take what broadcasts, and integers of 64 bits.
        positions = jnp.broadcast_to(positions, queries.shape[:2]).astype(jnp.int32)
        p = jnp.broadcast_to(self.earliest[:, None] if judges is None else judges, positions.shape).astype(jnp.int32)
        exact_keys, exact_values = _whole(p, residual), p - residual + 1
        oldest = jnp.zeros_like(p) if settings.window is None else jnp.maximum(positions - settings.window + 1, 0)
        first = self._first[:, None]
        near = -(-(2 * residual + self.tokens - 1) // residual) * residual
        parts = [
            Part(self._both_coded, cache.values.positions, oldest, jnp.minimum(positions, exact_values - 1)),
            Part(
                self._coded_keys,
                residual if judges is None else near,
                jnp.maximum(oldest, exact_values) - first,
                jnp.minimum(positions, exact_keys - 1) - first,
            ),
            Part(self._both_exact(near), near, jnp.maximum(oldest, exact_keys) - first, positions - first),
        ]
        return attention_over(rotated(queries, positions, self.rope), parts, settings)

    @property
    def _first(self) -> jax.Array:
        """int32 [B], the position of the first slot of the parts that hold something exact; a multiple of R."""
        residual = self.cache.settings.residual
        return _whole(self.earliest, residual) - residual

    def _both_coded(self, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Decodes keys and values."""
        cache = self.cache
        positions = first + jnp.arange(cache.block, dtype=jnp.int32)
        keys = self._turned(cache.keys.read(first, cache.block).swapaxes(2, 3), positions[None])
        values = cache.values.read(first, cache.block, cache.recent_values.shape[-1])
        return _joined(keys).swapaxes(1, 2), _joined(values)

    def _coded_keys(self, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Decodes the R keys from a position that begins a flush, or one below 0, which nobody sees."""
        begin = self._first + first
        positions = begin[:, None] + jnp.arange(self.cache.settings.residual, dtype=jnp.int32)
        keys = self.cache.keys.read(jnp.maximum(begin, 0), positions.shape[1]).swapaxes(2, 3)
        return _joined(self._turned(keys, positions)).swapaxes(1, 2), _joined(self.values.at(positions))

    def _both_exact(self, slots: int) -> ReadBlock:
        """A block of up to BLOCK_SLOTS exact tokens."""
        residual = self.cache.settings.residual
        block = min(slots, max(BLOCK_SLOTS // residual, 1) * residual)

        def read(first: jax.Array) -> tuple[jax.Array, jax.Array]:
            positions = (self._first + first)[:, None] + jnp.arange(block, dtype=jnp.int32)
            keys = self._turned(self.keys.at(positions), positions)
            return _joined(keys).swapaxes(1, 2), _joined(self.values.at(positions))

        return read

    def _turned(self, keys: jax.Array, positions: jax.Array) -> jax.Array:
        """Keys [B, Hkv, N, D] at positions [B or 1, N], rotated if the cache holds them as they are."""
        if self.cache.settings.rotated or self.rope is None:
            return keys
        positions = jnp.broadcast_to(positions, (keys.shape[0], positions.shape[1]))
        return self.rope.rotate(keys.swapaxes(1, 2), positions).swapaxes(1, 2)


def _whole(n: jax.Array, residual: int) -> jax.Array:
    """n - n mod R for n >= 0; a negative n belongs to padding, and what becomes of it has no meaning."""
    return jax.lax.div(n, jnp.int32(residual)) * residual


def _joined(x: jax.Array) -> jax.Array:
    """[B, Hkv, N, D] -> [B * Hkv, N, D]."""
    return x.reshape(-1, *x.shape[2:])


@dataclasses.dataclass(frozen=True)
class Kivi:
    """A cache factory: keys in codes by channel, values in codes by token, the newest tokens as they are.

        generate(model, ..., cache=Kivi(bits=2)), model.init_cache(1, 512, cache=Kivi())

    Keys have outliers in fixed channels, so `group_size` consecutive tokens of one channel share a step; values have
    none, so `group_size` channels of one token do. A step and a lowest number, in the model's dtype, belong to each
    group. Keys wait until there are R = `residual` of them; of n tokens, n mod R keys and R values are exact. As
    published, a key that fills up the R is still exact to its own token. A row's tokens are counted from its first, so
    padding on the left changes nothing.

    Attributes:
        bits: of each number; 4 or 2.
        key_bits: of keys, where they have others; None is `bits`.
        value_bits: of values, where they have others; None is `bits`.
        group_size: numbers that share a step, a multiple of 8. Values of fewer channels share one.
        residual: how many of the newest tokens are kept exact, a multiple of `group_size`.
        rotated: store keys after their rotation, as published, or before it and rotate them when they are read.
        exact_prompt: tokens that come together are exact to each other, as in the prompt of a published generation. If
            not, each sees what it would see if they came one by one, as evaluation has it.
    """

    bits: Literal[4, 2] = 4
    key_bits: Literal[4, 2] | None = None
    value_bits: Literal[4, 2] | None = None
    group_size: int = 32
    residual: int = 128
    rotated: bool = True
    exact_prompt: bool = True

    def __post_init__(self) -> None:
        for name in ("bits", "key_bits", "value_bits"):
            got = getattr(self, name)
            if got not in (4, 2) and (name == "bits" or got is not None):
                raise ValueError(f"{name} is {got}, and 4 or 2 is needed; leave the cache out to round nothing")
        if self.group_size < 8 or self.group_size % 8:
            raise ValueError(f"group_size is {self.group_size}, and a multiple of 8 is needed; take 32 or 64")
        if self.residual < 1 or self.residual % self.group_size:
            raise ValueError(
                f"residual is {self.residual}, and a multiple of group_size, {self.group_size}, is needed, since keys "
                f"are quantized in whole groups; take {-(-max(self.residual, 1) // self.group_size) * self.group_size}"
            )

    def create(
        self, block: int, batch: int, length: int, heads: int, head_dim: int, start: jax.Array, dtype: DTypeLike
    ) -> KiviCache:
        """An empty cache, the same for every block."""
        # Blocks of equal size, of which no more are read than needed. Kernels read groups in pairs.
        coded, unit = max(length - self.residual, 1), 2 * self.group_size
        count = -(-coded // BLOCK_SLOTS)
        size = -(-coded // (count * unit)) * unit
        flushed = -(-max(length // self.residual, 1) * self.residual // unit) * unit
        ring = jnp.zeros((batch, heads, self.residual, head_dim), dtype)
        shape, rest = (batch, heads, head_dim), (self.group_size, dtype)
        return KiviCache(
            KeySlab.create(*shape, max(count * size, flushed), self.key_bits or self.bits, *rest),
            ValueSlab.create(*shape, count * size, self.value_bits or self.bits, *rest),
            ring,
            jnp.array(ring),
            jnp.zeros((), jnp.int32),
            start,
            length,
            size,
            self,
        )

    def as_decoded(self) -> "Kivi":
        """See `kv_cache.as_decoded`."""
        return dataclasses.replace(self, exact_prompt=False)
