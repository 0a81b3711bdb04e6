"""What a KIVI cache holds as codes; letters as in `kv_cache.base`, and P positions for which there is room.

Rows have positions of their own, so they are written one after another, in place.
"""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from any4_jax.kv_cache.by_token import each_piece, leaving
from any4_jax.kv_cache.codes import Codes, decode, encode, update
from any4_jax.kv_cache.ring import Recent
from any4_jax.pytree import register_dataclass


@register_dataclass
@dataclasses.dataclass(frozen=True)
class KeySlab:
    """Keys in groups of consecutive positions of one channel.

    Attributes:
        codes: of [B, Hkv, D, P].
        bits, group_size: of the codes (static).
    """

    codes: Codes
    bits: int = dataclasses.field(metadata=dict(static=True))
    group_size: int = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def create(
        cls, batch: int, heads: int, head_dim: int, positions: int, bits: int, group_size: int, dtype: DTypeLike
    ) -> Self:
        """An empty one, for a multiple of `group_size` of positions."""
        return cls(_zeros((batch, heads, head_dim), positions, bits, group_size, dtype), bits, group_size)

    def stored(self, keys: Recent) -> Self:
        """With the keys that fill up a ring: R at a time, once the last of them arrives."""
        batch, _, residual, _ = keys.ring.shape
        flushes = (residual - 1 + keys.new.shape[2]) // residual

        def store(b: jax.Array, j: jax.Array, codes: Codes) -> Codes:
            arrival = keys.arrival.of_row(b)
            first = (jax.lax.div(arrival.before, jnp.int32(residual)) + j) * residual

            def flush(codes: Codes) -> Codes:
                full = keys.of_row(b, first + jnp.arange(residual, dtype=jnp.int32))
                new = encode(full.swapaxes(1, 2), self.bits, self.group_size, codes.steps.dtype)
                return update(codes, new, lambda size: (b, 0, 0, jax.lax.div(first, jnp.int32(residual // size))))

            return jax.lax.cond(first + residual <= arrival.after, flush, lambda codes: codes, codes)

        return dataclasses.replace(self, codes=each_piece(batch, flushes, store, self.codes))

    def read(self, first: jax.Array, count: int) -> jax.Array:
        """float32 [B, Hkv, D, count] of the positions from `first` int32 [B] on, or [] for all rows alike."""
        if first.ndim:
            return jax.vmap(lambda codes, first: self._decoded(codes, first, count))(self.codes, first)
        return self._decoded(self.codes, first, count)

    def _decoded(self, codes: Codes, first: jax.Array, count: int) -> jax.Array:
        def part(slab: jax.Array, per: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(slab, jax.lax.div(first, jnp.int32(per)), count // per, -1)

        parts = Codes(*map(part, codes, (8 // self.bits, self.group_size, self.group_size)))
        return decode(parts, self.bits, self.group_size, count)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class ValueSlab:
    """Values in groups of channels of one position.

    Attributes:
        codes: of [B, Hkv, P, D].
        bits, group_size: of the codes (static).
    """

    codes: Codes
    bits: int = dataclasses.field(metadata=dict(static=True))
    group_size: int = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def create(
        cls, batch: int, heads: int, head_dim: int, positions: int, bits: int, group_size: int, dtype: DTypeLike
    ) -> Self:
        """An empty one."""
        return cls(_zeros((batch, heads, positions), head_dim, bits, group_size, dtype), bits, group_size)

    @property
    def positions(self) -> int:
        """P."""
        return self.codes.packed.shape[2]

    def stored(self, values: Recent) -> Self:
        """With the values that leave the ring: all but the newest R."""
        encoded = functools.partial(encode, bits=self.bits, group_size=self.group_size, dtype=self.codes.steps.dtype)
        return dataclasses.replace(self, codes=leaving(self.codes, values, encoded))

    def read(self, first: jax.Array, count: int, channels: int) -> jax.Array:
        """float32 [B, Hkv, count, D] of the positions from `first` on; D is `channels`."""
        part = jax.tree.map(lambda slab: jax.lax.dynamic_slice_in_dim(slab, first, count, 2), self.codes)
        return decode(part, self.bits, self.group_size, channels)


def _zeros(shape: tuple[int, ...], count: int, bits: int, group_size: int, dtype: DTypeLike) -> Codes:
    """Codes of zeros [*shape, count]: masked positions that were never written are finite."""
    of_codes = jax.eval_shape(lambda: encode(jnp.zeros((*shape, count)), bits, group_size, dtype))
    return jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), of_codes)
