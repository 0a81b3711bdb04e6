"""The step of a KIVI cache for one token a row, as a launch of the CUDA kernel of `cuda_ffi`."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from any4_jax.choice import Backend
from any4_jax.kv_cache import one_token
from any4_jax.kv_cache.base import Rope, is_pair_rope, rotate_pairs, rotated
from any4_jax.kv_cache.codes import Codes
from any4_jax.kv_cache.plain import append_then_attend, plain_elsewhere
from any4_jax.kv_cache.settings import AttentionSettings

if TYPE_CHECKING:
    from any4_jax.kv_cache.kivi import KiviCache


def _supports(
    cache: "KiviCache", queries: jax.Array, keys: jax.Array, settings: AttentionSettings, platform: str
) -> str | None:
    reason = one_token.why_not("cuda", queries, platform)
    if reason is not None:
        return reason
    if not cache.settings.rotated:
        return "the cache holds keys before their rotation"
    from cuda_ffi import kivi_attention, registration

    reason = kivi_attention.why_not(
        queries.shape[2], cache.settings.group_size, held_by(cache), queries.dtype, keys.dtype
    )
    return reason or registration.why_not("cuda")


def _run(
    cache: "KiviCache",
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    *,
    rope: Rope | None,
    settings: AttentionSettings,
) -> tuple[jax.Array, "KiviCache"]:
    positions = one_token.of_rows(positions, queries)
    factors: tuple[jax.Array, ...] = ()
    if is_pair_rope(rope):
        factors = rope.factors(positions)
    else:
        queries, keys = rotated(queries, positions, rope), rotated(keys, positions, rope)
    leaves, structure = jax.tree.flatten(cache)
    tokens = queries, keys, values.astype(queries.dtype), positions
    return _fused(structure, settings)(*tokens, *leaves, *factors)


@functools.cache
def _fused(structure: Any, settings: AttentionSettings) -> Callable[..., Any]:
    """The step of the leaves of a cache of this structure, with factors (cos, sin) [B, 1, D/2] instead of a rope, or
    none."""
    count = structure.num_leaves

    def plainly(queries, keys, values, positions, *rest):
        cache, factors = jax.tree.unflatten(structure, rest[:count]), rest[count:]
        if factors:
            queries, keys = (rotate_pairs(x, *factors) for x in (queries, keys))
        return append_then_attend(cache, queries, keys, values, positions, rope=None, settings=settings)

    def launch(queries, keys, values, positions, *rest):
        from cuda_ffi import kivi_attention

        cache, factors = jax.tree.unflatten(structure, rest[:count]), rest[count:]
        # Of the one token, without its axis.
        mixed, held = kivi_attention.attend(
            queries[:, 0],
            keys[:, 0],
            values[:, 0],
            held_by(cache),
            positions[:, 0],
            jnp.broadcast_to(cache.start, len(queries)).astype(jnp.int32),
            (factors[0][:, 0], factors[1][:, 0]) if factors else None,
            group_size=cache.settings.group_size,
            **one_token.options(queries, settings),
        )
        return mixed[:, None], _holding(cache, held)

    return plain_elsewhere(launch, plainly)


def held_by(cache: "KiviCache") -> Any:
    """The arrays as the kernel names them."""
    from cuda_ffi.kivi_attention import Held

    length = cache.length.astype(jnp.int32) if isinstance(cache.length, jax.Array) else cache.length
    return Held(cache.recent_keys, cache.recent_values, *cache.keys.codes, *cache.values.codes, length)


def _holding(cache: "KiviCache", held: Any) -> "KiviCache":
    keys, values, *codes, length = held
    return cache.holding(Codes(*codes[:3]), Codes(*codes[3:]), keys, values, length.astype(cache.length.dtype))


CUDA = Backend("cuda", _supports, _run)
