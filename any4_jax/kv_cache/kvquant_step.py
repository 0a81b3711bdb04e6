"""What puts a token of each row into a KVQuant cache and attends: XLA, or a kernel of `cuda_ffi`."""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from any4_jax.choice import Backend, Choice
from any4_jax.kv_cache import one_token
from any4_jax.kv_cache.base import Rope, is_linear_rope, is_pair_rope, rotated
from any4_jax.kv_cache.nonuniform import TokenCodes
from any4_jax.kv_cache.plain import append_then_attend, plain_elsewhere
from any4_jax.kv_cache.settings import AttentionSettings

if TYPE_CHECKING:
    from any4_jax.kv_cache.kvquant_cache import KVQuantCache


def _supports(
    cache: "KVQuantCache",
    queries: jax.Array,
    keys: jax.Array,
    rope: Rope | None,
    settings: AttentionSettings,
    platform: str,
    *,
    own: str,
) -> str | None:
    reason = one_token.why_not(own, queries, platform)
    if reason is not None:
        return reason
    if not is_linear_rope(rope):
        return "the rope's angles aren't proportional to the position"
    from cuda_ffi import registration

    reason = _kernels(own).why_not(queries.shape[2], held_by(cache), queries.dtype)
    return reason or registration.why_not(own)


def _kernels(platform: str) -> Any:
    from cuda_ffi import kvquant_attention, kvquant_attention_cpu

    return kvquant_attention if platform == "cuda" else kvquant_attention_cpu


def _run(
    cache: "KVQuantCache",
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    *,
    rope: Rope | None,
    settings: AttentionSettings,
    own: str,
) -> tuple[jax.Array, "KVQuantCache"]:
    cache = cache.append(keys, values, positions, rope)
    positions = one_token.of_rows(positions, queries)

    def plainly(queries: jax.Array, positions: jax.Array, cache: "KVQuantCache") -> jax.Array:
        return cache.attend(queries, positions, rope, settings)

    run = plain_elsewhere(functools.partial(kernel, own, rope=rope, settings=settings), plainly)
    return run(queries, positions, cache), cache


def kernel(
    platform: str,
    queries: jax.Array,
    positions: jax.Array,
    cache: "KVQuantCache",
    *,
    rope: Rope | None,
    settings: AttentionSettings,
    **options: Any,
) -> jax.Array:
    """Attention of the newest token, queries [B, 1, H, D] at positions int32 [B, 1], by a platform's kernel, which has
    `options` of its own."""
    kernels, held = _kernels(platform), held_by(cache)

    def factors(count: int, apart: int) -> Any:
        """(cos, sin), float32 [count, D/2]."""
        if not is_pair_rope(rope):
            return None
        return [each[0] for each in rope.factors(jnp.arange(count, dtype=jnp.int32)[None] * apart)]

    # Of the one token, without its axis.
    mixed = kernels.attend(
        rotated(queries, positions, rope)[:, 0],
        held,
        positions[:, 0],
        factors(kernels.CHUNK, 1),
        factors(kernels.chunks(held), kernels.CHUNK),
        bits=cache.bits,
        **one_token.options(queries, settings),
        **options,
    )
    return mixed[:, None]


def held_by(cache: "KVQuantCache") -> Any:
    """The arrays as the kernel names them."""
    from cuda_ffi.kvquant_attention import Coded, Held

    def coded(codes: TokenCodes) -> Coded:
        planes = codes.packed if isinstance(codes.packed, tuple) else (codes.packed,)
        return Coded(planes, codes.outliers, codes.channels, codes.ranges)

    exact = cache.first_keys, cache.first_values, cache.recent_keys, cache.recent_values
    levels = cache.levels.keys, cache.levels.scales, cache.levels.offsets, cache.levels.values
    return Held(coded(cache.keys), coded(cache.values), *levels, *exact)


def _backend(platform: str) -> Backend:
    return Backend(platform, functools.partial(_supports, own=platform), functools.partial(_run, own=platform))


# (the cache, queries, new keys, rope, settings) is the problem that they support or not.
BACKENDS = Choice((_backend("cuda"), _backend("cpu"), Backend("xla", lambda *problem: None, append_then_attend)))
