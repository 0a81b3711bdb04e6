"""The step of a dense cache as one call of the C++ kernel of `cuda_ffi`."""

from typing import Any

import jax

from any4_jax.choice import Backend
from any4_jax.kv_cache.fused import fused_step
from any4_jax.kv_cache.plain import Step, check_fits
from any4_jax.kv_cache.settings import AttentionSettings


def _supports(
    queries: jax.Array,
    new_keys: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    settings: AttentionSettings,
    platform: str,
) -> str | None:
    if platform != "cpu":
        return f"it runs on cpu, not on {platform}"
    from cuda_ffi import attention_cpu, registration

    reason = attention_cpu.why_not(queries.shape[-1], queries.dtype, new_keys.dtype, keys.dtype, values.dtype)
    return reason or registration.why_not("cpu")


def _run(*operands: jax.Array, **settings: Any) -> Step:
    from cuda_ffi import attention_cpu

    queries, _, _, keys, *_ = operands
    check_fits(queries.shape[1], keys.shape[-1])
    return fused_step(attention_cpu.attend, *operands, **settings)


CPU = Backend("cpu", _supports, _run)
