"""The plain cache: rotated keys and values in the model's own dtype."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from any4_jax.kv_cache.attention import attention
from any4_jax.kv_cache.base import Rope, rotated
from any4_jax.kv_cache.settings import PLAIN, AttentionSettings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
    """Keys and values, stored unquantized; see `kv_cache.base` for slots, positions and the letters.

    Attributes:
        keys: [B * Hkv, D, S], rotated when appended. In this layout both products read the cache in place. With slots
            before heads, XLA on a CPU transposes the whole cache at each step and block; with B and Hkv as separate
            axes it writes a copy.
        values: [B * Hkv, S, D].
        length: int32 scalar, the slots in use; the next token goes there.
        start: int32 [B], the first slot of each row that holds no padding.
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array
    start: jax.Array

    @classmethod
    def create(
        cls, block: int, batch: int, length: int, heads: int, head_dim: int, start: jax.Array, dtype: DTypeLike
    ) -> Self:
        """An empty cache, the same for every block. It holds zeros, so that masked slots that were never written are
        finite."""
        keys = jnp.zeros((batch * heads, head_dim, length), dtype)
        values = jnp.zeros((batch * heads, length, head_dim), dtype)
        return cls(keys, values, jnp.zeros((), jnp.int32), start)

    def append(self, keys: jax.Array, values: jax.Array, positions: jax.Array, rope: Rope | None) -> Self:
        """Write keys and values [B, T, Hkv, D] to the next T slots.

        Raises:
            ValueError: T exceeds the number of slots.
        """
        tokens, slots = keys.shape[1], self.keys.shape[-1]
        if tokens > slots:
            raise ValueError(f"{tokens} tokens don't fit in a cache of {slots} slots; create a longer cache")

        def write(slab: jax.Array, new: jax.Array, axis: int) -> jax.Array:
            new = new.reshape(-1, *new.shape[2:]).astype(slab.dtype)
            return jax.lax.dynamic_update_slice_in_dim(slab, new, self.length, axis)

        return dataclasses.replace(
            self,
            keys=write(self.keys, rotated(keys, positions, rope).transpose(0, 2, 3, 1), 2),
            values=write(self.values, values.transpose(0, 2, 1, 3), 1),
            length=self.length + tokens,
        )

    def attend(
        self, queries: jax.Array, positions: jax.Array, rope: Rope | None, settings: AttentionSettings = PLAIN
    ) -> jax.Array:
        """Attention of queries [B, T, H, D] over the slots start..own of each row."""
        queries = rotated(queries, positions, rope)
        return attention(queries, self.keys, self.values, positions, self.start, settings)
