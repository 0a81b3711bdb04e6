"""The step of a KIVI cache for one token a row, with attention by the C++ kernel of `cuda_ffi`."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from any4_jax.choice import Backend
from any4_jax.kv_cache import one_token
from any4_jax.kv_cache.base import Rope, rotated
from any4_jax.kv_cache.kivi_cuda import held_by
from any4_jax.kv_cache.plain import plain_elsewhere
from any4_jax.kv_cache.settings import AttentionSettings

if TYPE_CHECKING:
    from any4_jax.kv_cache.kivi import KiviCache


def _supports(
    cache: "KiviCache", queries: jax.Array, keys: jax.Array, settings: AttentionSettings, platform: str
) -> str | None:
    reason = one_token.why_not("cpu", queries, platform)
    if reason is not None:
        return reason
    if not cache.settings.rotated:
        return "the cache holds keys before their rotation"
    from cuda_ffi import kivi_attention_cpu, registration

    reason = kivi_attention_cpu.why_not(cache.settings.group_size, held_by(cache), queries.dtype)
    return reason or registration.why_not("cpu")


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
    cache = cache.append(keys, values, positions, rope)
    positions = one_token.of_rows(positions, queries)
    leaves, structure = jax.tree.flatten(cache)
    return _attention(structure, settings)(rotated(queries, positions, rope), positions, *leaves), cache


@functools.cache
def _attention(structure: Any, settings: AttentionSettings) -> Callable[..., Any]:
    """Attention of rotated queries over the leaves of a cache of this structure."""

    def plainly(queries, positions, *leaves):
        return jax.tree.unflatten(structure, leaves).attend(queries, positions, None, settings)

    def kernel(queries, positions, *leaves):
        from cuda_ffi import kivi_attention_cpu

        cache = jax.tree.unflatten(structure, leaves)
        # Of the one token, without its axis.
        mixed = kivi_attention_cpu.attend(
            queries[:, 0],
            held_by(cache),
            positions[:, 0],
            group_size=cache.settings.group_size,
            **one_token.options(queries, settings),
        )
        return mixed[:, None]

    return plain_elsewhere(kernel, plainly)


CPU = Backend("cpu", _supports, _run)
