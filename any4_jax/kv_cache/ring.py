"""The newest R tokens as a ring, and T that arrive: the token at position p is in place p mod R of the ring.

Each row of a batch has its own positions, from 0 for its first token, whatever its padding; letters as in
`kv_cache.base`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Arrival(NamedTuple):
    """How many tokens each row has, and where the new ones are among the T that arrive; int32 [B], or of one row.

    Attributes:
        before, after: a row's tokens without the new ones, and with them.
        padding: how many of the T belong to the row's padding, which comes first.
    """

    before: jax.Array
    after: jax.Array
    padding: jax.Array

    @classmethod
    def of(cls, length: jax.Array, start: jax.Array, tokens: int) -> "Arrival":
        """Of T = `tokens` in the slots from `length` on; see `kv_cache.base` for `start`."""
        before, after = jnp.maximum(length - start, 0), jnp.maximum(length + tokens - start, 0)
        return cls(before, after, tokens - (after - before))

    def of_row(self, b: jax.Array) -> "Arrival":
        """Of one row."""
        return jax.tree.map(lambda each: _row(each, b), self)


class Recent(NamedTuple):
    """Keys or values: those of the last R tokens and of those that arrive.

    Attributes:
        ring: [B, Hkv, R, D], before the new ones come; R may be 0.
        new: [B, Hkv, T, D].
        arrival: of these.
    """

    ring: jax.Array
    new: jax.Array
    arrival: Arrival

    def of_row(self, b: jax.Array, positions: jax.Array) -> jax.Array:
        """[Hkv, N, D] of one row at positions int32 [N]; without meaning where they are of neither kind."""
        return _exact(_row(self.ring, b), _row(self.new, b), positions, self.arrival.of_row(b))

    def at(self, positions: jax.Array) -> jax.Array:
        """[B, Hkv, N, D] at positions int32 [B, N]; see `of_row`."""
        return jax.vmap(_exact)(self.ring, self.new, positions, self.arrival)

    def turned(self) -> jax.Array:
        """The ring with the new tokens in the places of the oldest."""
        residual, (before, after, padding) = self.ring.shape[2], self.arrival
        if residual == 0:
            return self.ring
        places = jnp.arange(residual, dtype=jnp.int32)
        newest = after[:, None] - 1
        # Of the positions p = place (mod R), the last that the row has; below `before` where the ring already holds it.
        positions = newest - jax.lax.rem(newest - places + residual, jnp.int32(residual))
        index = positions - before[:, None] + padding[:, None]
        fresh = jax.vmap(lambda new, index: jnp.take(new, index, axis=1, mode="clip"))(self.new, index)
        return jnp.where((positions >= before[:, None])[:, None, :, None], fresh, self.ring)


def with_first(kept: jax.Array, new: jax.Array, arrival: Arrival) -> jax.Array:
    """The first N tokens of each row, [B, Hkv, N, D] with position p in place p, once new ones [B, Hkv, T, D] came."""
    positions = jnp.broadcast_to(jnp.arange(kept.shape[2], dtype=jnp.int32), (kept.shape[0], kept.shape[2]))
    before, after = arrival.before[:, None], arrival.after[:, None]
    index = positions - before + arrival.padding[:, None]
    fresh = jax.vmap(lambda new, index: jnp.take(new, index, axis=1, mode="clip"))(new, index)
    return jnp.where(((positions >= before) & (positions < after))[:, None, :, None], fresh, kept)


def _exact(ring: jax.Array, new: jax.Array, positions: jax.Array, arrival: Arrival) -> jax.Array:
    fresh = jnp.take(new, positions - arrival.before + arrival.padding, axis=1, mode="clip")
    if ring.shape[1] == 0:
        return fresh
    # Of negative positions, which have no meaning, the remainder is negative too.
    old = jnp.take(ring, jax.lax.rem(positions, jnp.int32(ring.shape[1])), axis=1, mode="clip")
    return jnp.where((positions < arrival.before)[:, None], old, fresh)


def _row(x: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, b, keepdims=False)
