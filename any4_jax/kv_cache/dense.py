"""The plain cache: rotated keys and values in the model's own dtype."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from any4_jax.choice import Backend, Choice
from any4_jax.kv_cache.attention import attention
from any4_jax.kv_cache.base import Rope, rotated
from any4_jax.kv_cache.plain import appended
from any4_jax.kv_cache.settings import PLAIN, AttentionSettings
from any4_jax.kv_cache.step import BACKENDS, step
from any4_jax.pytree import register_dataclass


@register_dataclass
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
        slabs = appended(self.keys, self.values, rotated(keys, positions, rope), values, self.length)
        return self._holding(*slabs, self.length + keys.shape[1])

    def attend(
        self, queries: jax.Array, positions: jax.Array, rope: Rope | None, settings: AttentionSettings = PLAIN
    ) -> jax.Array:
        """Attention of queries [B, T, H, D] over the slots start..own of each row."""
        queries = rotated(queries, positions, rope)
        return attention(queries, self.keys, self.values, positions, self.start, settings)

    def append_attend(
        self,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        positions: jax.Array,
        rope: Rope | None,
        settings: AttentionSettings = PLAIN,
    ) -> tuple[jax.Array, Self]:
        """`append`, then `attend`, by the first of `step.BACKENDS` that can, which may be one launch.

        Raises:
            ValueError: T exceeds the number of slots.
        """
        held = self.keys, self.values, self.length
        mixed, *new = step(queries, keys, values, *held, positions, self.start, rope=rope, settings=settings)
        return mixed, self._holding(*new)

    def choice(
        self, queries: jax.Array, keys: jax.Array, rope: Rope | None, settings: AttentionSettings
    ) -> tuple[Choice[Backend], tuple[Any, ...]]:
        """See `Cache`."""
        return BACKENDS, (queries, keys, self.keys, self.values, settings)

    def with_slots(self, slots: int) -> Self:
        """The same tokens in a cache of more slots."""
        more = slots - self.values.shape[1]
        keys, values = (
            jnp.pad(self.keys, ((0, 0), (0, 0), (0, more))),
            jnp.pad(self.values, ((0, 0), (0, more), (0, 0))),
        )
        return self._holding(keys, values, self.length)

    def _holding(self, keys: jax.Array, values: jax.Array, length: jax.Array) -> Self:
        """This cache with other keys, values and length."""
        return dataclasses.replace(self, keys=keys, values=values, length=length)
