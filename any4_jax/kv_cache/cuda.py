"""The step of a dense cache for one token a row, as one launch of the CUDA kernel of `cuda_ffi`."""

from typing import Any

import jax

from any4_jax.choice import Backend
from any4_jax.kv_cache import one_token
from any4_jax.kv_cache.fused import fused_step
from any4_jax.kv_cache.plain import Step
from any4_jax.kv_cache.settings import AttentionSettings


def _supports(
    queries: jax.Array,
    new_keys: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    settings: AttentionSettings,
    platform: str,
) -> str | None:
    reason = one_token.why_not("cuda", queries, platform)
    if reason is not None:
        return reason
    from cuda_ffi import attention, registration

    rows, _, heads, size = queries.shape
    sizes = rows, heads, new_keys.shape[2], size, keys.shape[-1]
    reason = attention.why_not(*sizes, queries.dtype, new_keys.dtype, keys.dtype, values.dtype)
    return reason or registration.why_not("cuda")


def _attend(
    queries: jax.Array,
    new_keys: jax.Array,
    new_values: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    length: jax.Array,
    positions: jax.Array,
    start: jax.Array,
    factors: tuple[jax.Array, jax.Array] | None,
    **settings: Any,
) -> Step:
    """Of the one token of each row, whose axis the kernel doesn't have."""
    from cuda_ffi import attention

    new = queries[:, 0], new_keys[:, 0], new_values[:, 0]
    turned = None if factors is None else (factors[0][:, 0], factors[1][:, 0])
    held = keys, values, length, positions[:, 0], start
    mixed, keys, values, length = attention.attend(*new, *held, turned, **settings)
    return mixed[:, None], keys, values, length


def _run(*operands: jax.Array, **settings: Any) -> Step:
    return fused_step(_attend, *operands, **settings)


CUDA = Backend("cuda", _supports, _run)
