"""The CUDA product of `cuda_ffi` as a backend: it reads weights as they are stored; preparing one changes nothing."""

from typing import Any

import jax
import jax.numpy as jnp

from any4_jax import weights
from any4_jax.backends.base import Backend
from any4_jax.weights import QuantizedTensor


def _supports(x: Any, w: QuantizedTensor, platform: str) -> str | None:
    if platform != "cuda":
        return f"it runs on cuda, not on {platform}"
    if w.bits == 8 and not w.uniform:
        return "the table of 256 entries is no ramp"
    from cuda_ffi import lut_product_cuda, registration

    scales, offsets = (_dtype(a) for a in (w.scales, w.offsets))
    reason = lut_product_cuda.why_not(x.dtype, w.bits, w.group_size, w.shape[-1], w.lut.dtype, scales, offsets)
    return reason or registration.why_not("cuda")


def _dtype(stored: Any) -> Any:
    """Of an array; quantized scales are decoded to float32 for each product."""
    return jnp.dtype(jnp.float32) if isinstance(stored, QuantizedTensor) else getattr(stored, "dtype", None)


def _run(x: jax.Array, w: QuantizedTensor) -> jax.Array:
    from cuda_ffi.lut_product_cuda import lut_product

    codes = w.codes if isinstance(w.codes, tuple) else (w.codes,)
    scales, offsets = (weights.dequantize(a) if isinstance(a, QuantizedTensor) else a for a in (w.scales, w.offsets))
    return lut_product(x, codes, w.lut, scales, offsets, bits=w.bits, group_size=w.group_size)


CUDA = Backend(name="cuda", supports=_supports, run=_run, prepare=lambda w: w, unprepare=lambda arrays: arrays)
