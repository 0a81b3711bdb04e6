"""Steps by XLA, which the kernels must match: new keys and values enter a cache, and queries attend.

Letters as in `kv_cache.attention`. `kv_cache.base` defines slots and positions.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from any4_jax.kv_cache.attention import attention
from any4_jax.kv_cache.base import Cache, Rope, rotated
from any4_jax.kv_cache.settings import AttentionSettings

C = TypeVar("C", bound=Cache)

Step = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""The mixed values [B, T, H, D], and the cache's keys [B * Hkv, D, S], values [B * Hkv, S, D] and length."""


def appended(
    keys: jax.Array, values: jax.Array, new_keys: jax.Array, new_values: jax.Array, length: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A cache's keys [B * Hkv, D, S] and values [B * Hkv, S, D] with T new ones from slot `length` on.

    Args:
        keys, values: the cache's.
        new_keys, new_values: [B, T, Hkv, D], rotated.
        length: int32 scalar.

    Raises:
        ValueError: T exceeds S.
    """
    check_fits(new_keys.shape[1], keys.shape[-1])

    def write(slab: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        new = new.reshape(-1, *new.shape[2:]).astype(slab.dtype)
        return jax.lax.dynamic_update_slice_in_dim(slab, new, length, axis)

    return write(keys, new_keys.transpose(0, 2, 3, 1), 2), write(values, new_values.transpose(0, 2, 1, 3), 1)


def check_fits(tokens: int, slots: int) -> None:
    """Raises ValueError if so many tokens exceed a cache of so many slots."""
    if tokens > slots:
        raise ValueError(f"{tokens} tokens don't fit in a cache of {slots} slots; create a longer cache")


def plain_step(
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
    """See `kv_cache.step.step`."""
    new_keys = rotated(new_keys, positions, rope)
    keys, values = appended(keys, values, new_keys, new_values, length)
    mixed = attention(rotated(queries, positions, rope), keys, values, positions, start, settings)
    return mixed, keys, values, length + new_keys.shape[1]


def append_then_attend(
    cache: C,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    *,
    rope: Rope | None,
    settings: AttentionSettings,
) -> tuple[jax.Array, C]:
    """The step of a cache by its own two methods, which kernels of both must match."""
    cache = cache.append(keys, values, positions, rope)
    return cache.attend(queries, positions, rope, settings), cache


def plain_elsewhere(run: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """`run` of arrays; under vmap and in derivatives it is `plain`, which computes the same in a form that has them."""

    @jax.custom_batching.custom_vmap
    def alone(*operands):
        return run(*operands)

    @alone.def_vmap
    def _rule(axis_size, batched, *operands):
        out = jax.vmap(plain, [0 if b else None for b in batched])(*operands)
        return out, jax.tree.map(lambda _: True, out)

    @jax.custom_jvp
    def whole(*operands):
        return alone(*operands)

    @whole.defjvp
    def _derivative(primals, tangents):
        return jax.jvp(plain, primals, tangents)

    return whole
