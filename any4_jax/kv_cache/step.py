"""One step of a dense cache: new keys and values are written, and queries attend; and what can do both at once.

Letters as in `kv_cache.attention`. `kv_cache.base` defines slots and positions.
"""

import functools

import jax

from any4_jax.choice import Backend, Choice
from any4_jax.kv_cache.base import Rope
from any4_jax.kv_cache.cpu import CPU
from any4_jax.kv_cache.cuda import CUDA
from any4_jax.kv_cache.cudnn import CUDNN
from any4_jax.kv_cache.plain import Step, plain_step
from any4_jax.kv_cache.settings import PLAIN, AttentionSettings

# (queries, new keys, the cache's keys and values, settings) is the problem that they support or not.
BACKENDS = Choice((CUDA, CUDNN, CPU, Backend("xla", lambda *problem: None, plain_step)))


def step(
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
    settings: AttentionSettings = PLAIN,
    backend: str | None = None,
) -> Step:
    """Rotates queries and new keys, writes new keys and values to the cache, and attends over it.

    Args:
        queries: [B, T, H, D].
        new_keys, new_values: [B, T, Hkv, D].
        keys, values: the cache's, [B * Hkv, D, S] and [B * Hkv, S, D].
        length: int32 scalar, the slot of the first new token.
        positions: int32 [B, T], of the new tokens: token t of row b is in slot length + t, at position slot - start[b].
        start: int32 [B].
        rope: the rotation, or None.
        settings: scale, softcap and window.
        backend: a name in `BACKENDS`; None for the first that works on the platform the program is lowered for.

    Raises:
        ValueError: T exceeds S; or no backend has that name, or it can't do this; the message gives the reason.
    """
    operands = queries, new_keys, new_values, keys, values, length, positions, start
    problem = queries, new_keys, keys, values, settings
    name = BACKENDS.choose(backend, *problem, arrays=operands)
    return BACKENDS.lowered(
        lambda option: functools.partial(option.run, rope=rope, settings=settings), *problem, name=name
    )(*operands)
