"""The step of a dense cache as one call of a kernel that rotates, writes and attends."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax.kv_cache import one_token
from any4_jax.kv_cache.base import Rope, is_pair_rope, rotate_pairs, rotated
from any4_jax.kv_cache.plain import Step, plain_elsewhere, plain_step
from any4_jax.kv_cache.settings import AttentionSettings

Attend = Callable[..., Step]
"""As `cuda_ffi.attention_cpu.attend`."""


def fused_step(
    attend: Attend,
    queries: jax.Array,
    new_keys: jax.Array,
    new_values: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    length: jax.Array,
    positions: jax.Array,
    start: jax.Array,
    *,
    rope: Rope | None,
    settings: AttentionSettings,
) -> Step:
    """See `kv_cache.step.step`. Under vmap and in derivatives it is XLA's."""
    positions = one_token.of_rows(positions, queries)
    slots = jnp.asarray(length, jnp.int32), positions, jnp.broadcast_to(start, len(queries)).astype(jnp.int32)
    factors: tuple[jax.Array, ...] = ()
    if is_pair_rope(rope):
        factors = rope.factors(positions)
    else:
        queries, new_keys = rotated(queries, positions, rope), rotated(new_keys, positions, rope)
    arrays = queries, new_keys, new_values.astype(queries.dtype), keys, values, *slots
    mixed, keys, values, used = _fused(attend, settings)(*arrays, *factors)
    return mixed, keys, values, used.astype(length.dtype)


@functools.cache
def _fused(attend: Attend, settings: AttentionSettings) -> Callable[..., Any]:
    """The step with factors (cos, sin) [B, T, D/2] instead of a rope, or none."""

    def plain(queries, new_keys, new_values, keys, values, length, positions, start, *factors):
        if factors:
            queries, new_keys = (rotate_pairs(x, *factors) for x in (queries, new_keys))
        operands = queries, new_keys, new_values, keys, values, length, positions, start
        return plain_step(*operands, rope=None, settings=settings)

    def launch(queries, new_keys, new_values, keys, values, length, positions, start, *factors):
        return attend(
            queries,
            new_keys,
            new_values,
            keys,
            values,
            length,
            positions,
            start,
            factors or None,
            **one_token.options(queries, settings),
        )

    return plain_elsewhere(launch, plain)
