"""The steps of a cache whose newest tokens are a ring, and whose others are codes."""

import abc
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp

from any4_jax.kv_cache.base import Rope
from any4_jax.kv_cache.one_token import step
from any4_jax.kv_cache.plain import check_fits
from any4_jax.kv_cache.ring import Arrival, Recent
from any4_jax.kv_cache.settings import PLAIN, AttentionSettings


class Reader(Protocol):
    """Attention over a cache that holds all tokens, and over those that are exact to some query.

    A query is *judged* at a position p, its own or that of another token of its row: what is quantized and what exact
    to it is what the token at p would have seen.
    """

    def attend(
        self, queries: jax.Array, positions: jax.Array, judges: jax.Array | None, settings: AttentionSettings
    ) -> jax.Array:
        """Attention of queries [B, T, H, D]; `judges` is the p of each, int32 [B, T], or None for the lowest of the
        row."""
        ...


class RingCache(abc.ABC):
    """What such a cache inherits, a frozen dataclass that is a pytree; letters as in `kv_cache.base`.

    Attributes:
        recent_keys, recent_values: [B, Hkv, R, D], the newest R tokens; see `kv_cache.ring`.
        length: int32 scalar, the slots in use.
        start: int32 [B], the first slot of each row that holds no padding.
        slots: S.
    """

    recent_keys: jax.Array
    recent_values: jax.Array
    length: jax.Array
    start: jax.Array
    slots: int

    @abc.abstractmethod
    def with_tokens(self, keys: Recent, values: Recent) -> Self:
        """The cache with tokens that arrive."""

    @abc.abstractmethod
    def reader(self, keys: Recent, values: Recent, rope: Rope | None, earliest: jax.Array, tokens: int) -> Reader:
        """For queries that are judged from `earliest` int32 [B] on, at positions below `earliest` + `tokens`."""

    def kept(self, keys: jax.Array, positions: jax.Array, rope: Rope | None) -> jax.Array:
        """Keys as they are stored; before their rotation unless a cache has it otherwise."""
        del positions, rope
        return keys

    def judges(self, positions: jax.Array) -> jax.Array | None:
        """Where each of several tokens that come together is judged: at its own position."""
        return positions

    def append(self, keys: jax.Array, values: jax.Array, positions: jax.Array, rope: Rope | None) -> Self:
        """Add keys and values [B, T, Hkv, D].

        Raises:
            ValueError: T exceeds the number of slots.
        """
        return self.with_tokens(*self._arriving(keys, values, positions, rope))

    def attend(
        self, queries: jax.Array, positions: jax.Array, rope: Rope | None, settings: AttentionSettings = PLAIN
    ) -> jax.Array:
        """Attention of queries [B, T, H, D] over what is exact and what is quantized for the newest token."""
        count = jnp.maximum(self.length - self.start, 0)
        # Nothing arrives, and the rings hold all that is exact.
        arrival = Arrival(count, count, jnp.zeros_like(count))
        keys, values = (Recent(ring, ring, arrival) for ring in (self.recent_keys, self.recent_values))
        return self.reader(keys, values, rope, count - 1, 1).attend(queries, positions, None, settings)

    def append_attend(
        self,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        positions: jax.Array,
        rope: Rope | None,
        settings: AttentionSettings = PLAIN,
    ) -> tuple[jax.Array, Self]:
        """`append`, then attention of the new tokens. One token a row is a `one_token.step`.

        Raises:
            ValueError: T exceeds the number of slots.
        """
        if keys.shape[1] == 1:
            return step(self, queries, keys, values, positions, rope=rope, settings=settings)
        recent = self._arriving(keys, values, positions, rope)
        cache = self.with_tokens(*recent)
        reader = cache.reader(*recent, rope, recent[0].arrival.before, keys.shape[1])
        return reader.attend(queries, positions, self.judges(positions), settings), cache

    @abc.abstractmethod
    def choice(
        self, queries: jax.Array, keys: jax.Array, rope: Rope | None, settings: AttentionSettings
    ) -> tuple[Any, tuple[Any, ...]]:
        """See `Cache`."""

    def _arriving(
        self, keys: jax.Array, values: jax.Array, positions: jax.Array, rope: Rope | None
    ) -> tuple[Recent, Recent]:
        check_fits(keys.shape[1], self.slots)
        arrival, dtype = Arrival.of(self.length, self.start, keys.shape[1]), self.recent_keys.dtype
        new = (x.transpose(0, 2, 1, 3).astype(dtype) for x in (self.kept(keys, positions, rope), values))
        rings = self.recent_keys, self.recent_values
        first, second = (Recent(ring, x, arrival) for ring, x in zip(rings, new, strict=True))
        return first, second
