"""The protocol between an attention layer and its cache.

Letters: B rows of the batch, T new tokens, S slots of the cache, H query heads, Hkv key/value heads, D head
size.

A *slot* is a place in the cache; all rows of a batch write the same slots. Prompts of unequal length are
padded on the left, so row b's first token lies in slot `start[b]` and

    position = slot - start[b]

is what the rotary embedding sees. A negative position marks padding.

Attention hands over keys and queries *before* their rotation, because a cache may want to store keys
unrotated (their channels then keep a steady scale, which quantizes better) and rotate them when read.
"""

from typing import Protocol, Self, runtime_checkable

import jax
from jax.typing import DTypeLike


class Rope(Protocol):
    """A rotary position embedding."""

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotate x [B, T, heads, D] by the angles of positions int32 [B, T]; same shape and dtype as x."""
        ...


@runtime_checkable
class Cache(Protocol):
    """The keys and values of one layer: an immutable pytree whose shapes never change."""

    def append(self, keys: jax.Array, values: jax.Array, positions: jax.Array, rope: Rope) -> Self:
        """A cache that also holds T new tokens.

        Args:
            keys, values: [B, T, Hkv, D], keys not rotated.
            positions: int32 [B, T].
            rope: the rotation that belongs to these keys.

        Raises:
            ValueError: T is more than the slots of the cache. How many of them are used is only known when
                the program runs, so the caller answers for the sum of all appends.
        """
        ...

    def attend(self, queries: jax.Array, positions: jax.Array, rope: Rope) -> jax.Array:
        """Causal attention of queries [B, T, H, D] (not rotated) at `positions` over all that was appended.

        A query sees the tokens of its row whose position is at most its own. Returns [B, T, H, D] in the
        queries' dtype; rows of padding are finite and mean nothing. H is a multiple of Hkv.
        """
        ...


class CacheFactory(Protocol):
    """What makes caches: a cache class, or a frozen (hashable) object that carries its settings."""

    def create(self, batch: int, length: int, heads: int, head_dim: int, start: jax.Array, dtype: DTypeLike) -> Cache:
        """An empty cache of `length` slots for `heads` key/value heads; start int32 [B]."""
        ...
