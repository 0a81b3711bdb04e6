"""What kernels of steps have in common, whatever the cache; most take one token a row."""

import functools
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp

from any4_jax.kv_cache.base import Cache, Rope
from any4_jax.kv_cache.settings import PLAIN, AttentionSettings

C = TypeVar("C", bound=Cache)


def why_not(own: str, queries: jax.Array, platform: str) -> str | None:
    """None if a kernel of the platform `own` may take queries [B, T, H, D] on `platform`; else the reason in words."""
    if platform != own:
        return f"it runs on {own}, not on {platform}"
    return None if queries.shape[1] == 1 else f"there are {queries.shape[1]} new tokens a row, not 1"


def of_rows(positions: jax.Array, queries: jax.Array) -> jax.Array:
    """Positions as int32 [B, T]; other steps take what broadcasts, and integers of 64 bits."""
    return jnp.broadcast_to(positions, queries.shape[:2]).astype(jnp.int32)


def options(queries: jax.Array, settings: AttentionSettings) -> dict[str, Any]:
    """The settings as kernels take them."""
    scale = queries.shape[-1] ** -0.5 if settings.scale is None else settings.scale
    return dict(scale=scale, softcap=settings.softcap, window=settings.window)


def step(
    cache: C,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    *,
    rope: Rope | None,
    settings: AttentionSettings = PLAIN,
    backend: str | None = None,
) -> tuple[jax.Array, C]:
    """`append`, then `attend`, of a token of each row, by one of the kernels among which the cache's `choice` is.

    Args:
        cache: before the token.
        queries: [B, 1, H, D].
        keys, values: [B, 1, Hkv, D].
        positions: int32 [B, 1], length - start of the cache.
        rope: the rotation, or None.
        settings: scale, softcap and window.
        backend: the kernel's name; None for the first that works on the platform the program is lowered for.

    Returns:
        The mixed values [B, 1, H, D], and the cache with the token.

    Raises:
        ValueError: no backend has that name, or it can't do this; the message gives the reason.
    """
    backends, problem = cast(Any, cache).choice(queries, keys, rope, settings)
    operands = cache, queries, keys, values, positions
    name = backends.choose(backend, *problem, arrays=tuple(jax.tree.leaves(operands)))
    run = backends.lowered(
        lambda option: functools.partial(option.run, rope=rope, settings=settings), *problem, name=name
    )
    return cast(tuple[jax.Array, C], run(*operands))
