"""One step of a KIVI cache: a new token of each row enters it, and attends; and what can do both at once."""

import functools
from typing import TYPE_CHECKING, TypeVar

import jax

from any4_jax.choice import Backend, Choice
from any4_jax.kv_cache.base import Rope
from any4_jax.kv_cache.kivi_cpu import CPU
from any4_jax.kv_cache.kivi_cuda import CUDA
from any4_jax.kv_cache.plain import append_then_attend
from any4_jax.kv_cache.settings import PLAIN, AttentionSettings

if TYPE_CHECKING:
    from any4_jax.kv_cache.kivi import KiviCache

C = TypeVar("C", bound="KiviCache")

# (the cache, queries, new keys, settings) is the problem that they support or not.
BACKENDS = Choice((CUDA, CPU, Backend("xla", lambda *problem: None, append_then_attend)))


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
    """`append`, then `attend`, of a token of each row.

    Args:
        cache: before the token.
        queries: [B, 1, H, D].
        keys, values: [B, 1, Hkv, D].
        positions: int32 [B, 1], length - start of the cache.
        rope: the rotation, or None.
        settings: scale, softcap and window.
        backend: a name in `BACKENDS`; None for the first that works on the platform the program is lowered for.

    Returns:
        The mixed values [B, 1, H, D], and the cache with the token.

    Raises:
        ValueError: no backend has that name, or it can't do this; the message gives the reason.
    """
    problem = cache, queries, keys, settings
    operands = cache, queries, keys, values, positions
    name = BACKENDS.choose(backend, *problem, arrays=tuple(jax.tree.leaves(operands)))
    run = BACKENDS.lowered(
        lambda option: functools.partial(option.run, rope=rope, settings=settings), *problem, name=name
    )
    return run(*operands)
