"""The step of a dense cache for the many tokens of a prompt, by cuDNN's fused attention if the cache is empty.

Its memory grows with the tokens, not with their square, and it reads no slot of the cache. Whether the cache already
holds tokens is known only when the program runs: if it does, XLA's attention reads them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax.choice import Backend
from any4_jax.kv_cache.attention import attention, fits
from any4_jax.kv_cache.base import Rope, rotated
from any4_jax.kv_cache.plain import Step, appended, plain_elsewhere, plain_step
from any4_jax.kv_cache.settings import AttentionSettings


def _supports(
    queries: jax.Array,
    new_keys: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    settings: AttentionSettings,
    platform: str,
) -> str | None:
    if platform != "cuda":
        return f"it runs on cuda, not on {platform}"
    if settings.softcap is not None:
        return "scores have a softcap"
    kinds = sorted({jnp.dtype(x.dtype).name for x in (queries, new_keys, keys, values)})
    if kinds not in (["bfloat16"], ["float16"]):
        return f"queries and cache are {' and '.join(kinds)}, not bfloat16 or float16 alone"
    batch, tokens, heads, _ = queries.shape
    if fits(batch, tokens, heads, keys.shape[-1]):
        return "the scores are few enough for XLA to compute them at once"
    fresh = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (queries, new_keys, new_keys))
    try:
        jax.eval_shape(functools.partial(_fused_attention, settings=settings), *fresh)
    # What jax raises where it has no cuDNN, or one that doesn't take these shapes.
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"jax says: {error}"
    return None


def _fused_attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, *, settings: AttentionSettings
) -> jax.Array:
    """Causal attention of [B, T, H, D] over keys and values [B, T, Hkv, D] of the same tokens."""
    window = None if settings.window is None else (settings.window - 1, 0)
    return jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        scale=settings.scale,
        is_causal=True,
        local_window_size=window,
        implementation="cudnn",
    )


def _run(
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
    queries, new_keys = rotated(queries, positions, rope), rotated(new_keys, positions, rope)
    step: Step = _fused(settings)(queries, new_keys, new_values, keys, values, length, positions, start)
    return step


@functools.cache
def _fused(settings: AttentionSettings) -> Callable[..., Any]:
    """The step of rotated queries and keys."""

    def fused(queries, new_keys, new_values, keys, values, length, positions, start):
        slabs = appended(keys, values, new_keys, new_values, length)

        def of_the_new():
            # Without its padding on the left, a row needs no mask but the causal one: what follows it isn't seen.
            ahead = (_rolled(x, -start) for x in (queries, new_keys, new_values))
            return _rolled(_fused_attention(*ahead, settings=settings), start)

        def of_all():
            return attention(queries, *slabs, positions, start, settings)

        return jax.lax.cond(length == 0, of_the_new, of_all), *slabs, length + new_keys.shape[1]

    return plain_elsewhere(fused, functools.partial(plain_step, rope=None, settings=settings))


def _rolled(x: jax.Array, by: jax.Array) -> jax.Array:
    """x [B, T, heads, D] with the tokens of each row moved on by `by` int32 [B] places, the last ones to the front."""
    return jax.vmap(functools.partial(jnp.roll, axis=0))(x, by)


CUDNN = Backend("cudnn", _supports, _run)
