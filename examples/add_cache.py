"""Add a cache: keys and values as floats of 8 bits, a quarter of the bytes of float32.

Run: python examples/add_cache.py
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

import any4_jax as a4
from any4_jax.kv_cache import PLAIN, attention, rotated

FLOAT8 = jnp.float8_e4m3fn
LARGEST = float(jnp.finfo(FLOAT8).max)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Float8Cache:
    """B rows of S slots, Hkv heads of D channels. An append gives a new cache of the same shapes."""

    keys: jax.Array  # [B * Hkv, D, S], rotated
    values: jax.Array  # [B * Hkv, S, D]
    length: jax.Array  # slots in use
    start: jax.Array  # [B], the first slot of each row that holds no padding

    def append(self, keys, values, positions, rope) -> Self:  # [B, T, Hkv, D]
        def write(slab, new, axis):
            new = jnp.clip(new, -LARGEST, LARGEST).reshape(-1, *new.shape[2:]).astype(FLOAT8)
            return jax.lax.dynamic_update_slice_in_dim(slab, new, self.length, axis)

        return Float8Cache(
            write(self.keys, rotated(keys, positions, rope).transpose(0, 2, 3, 1), 2),
            write(self.values, values.transpose(0, 2, 1, 3), 1),
            self.length + keys.shape[1],
            self.start,
        )

    def attend(self, queries, positions, rope, settings=PLAIN) -> jax.Array:  # [B, T, H, D]
        keys, values = (slab.astype(queries.dtype) for slab in (self.keys, self.values))
        return attention(rotated(queries, positions, rope), keys, values, positions, self.start, settings)


class Float8:
    """Creates the cache of each block."""

    def create(self, block: int, batch: int, length: int, heads: int, head_dim: int, start: Any, dtype: Any):
        keys = jnp.zeros((batch * heads, head_dim, length), FLOAT8)
        return Float8Cache(keys, keys.transpose(0, 2, 1), jnp.zeros((), jnp.int32), start)


model, text = a4.models.load("tiny"), a4.data.stories()
for name, cache in (("dense", None), ("float8", Float8()), ("kivi, 2 bits", a4.kv_cache.Kivi(bits=2, residual=32))):
    print(
        f"{name:12}  perplexity {a4.evaluation.perplexity(model, text, seqlen=256, windows=2, cache=cache).value:.4f}"
    )
print(a4.generate(model, "Once upon a time", max_new_tokens=24, cache=Float8()))
