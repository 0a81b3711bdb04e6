"""The step of a dense cache for one token a row, as one call of the C++ kernel of `cuda_ffi`."""

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
    reason = one_token.why_not("cpu", queries, platform)
    if reason is not None:
        return reason
    from cuda_ffi import attention_cpu, registration

    reason = attention_cpu.why_not(queries.shape[-1], queries.dtype, new_keys.dtype, keys.dtype, values.dtype)
    return reason or registration.why_not("cpu")


def _run(*operands: jax.Array, **settings: Any) -> Step:
    from cuda_ffi import attention_cpu

    return fused_step(attention_cpu.attend, *operands, **settings)


CPU = Backend("cpu", _supports, _run)
