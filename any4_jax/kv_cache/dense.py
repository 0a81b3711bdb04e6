"""The plain cache: rotated keys and values in the model's own dtype."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from any4_jax.kv_cache.base import Rope


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
    """Keys and values as they are; see `kv_cache.base` for slots, positions and the letters.

    Attributes:
        keys: [B, S, Hkv, D], rotated when appended.
        values: [B, S, Hkv, D].
        length: int32 scalar, the slots in use; the next token goes there.
        start: int32 [B], the first slot of each row that holds no padding.
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array
    start: jax.Array

    @classmethod
    def create(cls, batch: int, length: int, heads: int, head_dim: int, start: jax.Array, dtype: DTypeLike) -> Self:
        """An empty cache: zeros, so that slots not yet written are finite behind their mask."""
        shape = (batch, length, heads, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32), start)

    def append(self, keys: jax.Array, values: jax.Array, positions: jax.Array, rope: Rope) -> Self:
        """Write keys and values [B, T, Hkv, D] into the next T slots."""
        tokens, slots = keys.shape[1], self.keys.shape[1]
        if tokens > slots:
            raise ValueError(f"{tokens} tokens do not fit a cache of {slots} slots; create a longer cache")

        def write(slab: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(slab, new.astype(slab.dtype), self.length, axis=1)

        return dataclasses.replace(
            self,
            keys=write(self.keys, rope.rotate(keys, positions)),
            values=write(self.values, values),
            length=self.length + tokens,
        )

    def attend(self, queries: jax.Array, positions: jax.Array, rope: Rope) -> jax.Array:
        """Attention of queries [B, T, H, D] over the slots start..own of each row; softmax in float32."""
        slots = jnp.arange(self.keys.shape[1], dtype=jnp.int32)
        own = positions + self.start[:, None]
        seen = (slots >= self.start[:, None, None]) & (slots <= own[:, :, None])
        # The mask is a large negative number and no infinity: a padding query, which sees nothing, averages
        # over everything instead of dividing zero by zero.
        return jax.nn.dot_product_attention(
            rope.rotate(queries, positions),
            self.keys.astype(queries.dtype),
            self.values.astype(queries.dtype),
            mask=seen[:, None],
            implementation="xla",
        )
