"""The C++ product of `cuda_ffi` as a backend. It reads weights as they are stored, so preparing one changes nothing."""

from typing import Any

import jax
import jax.numpy as jnp

from any4_jax import weights
from any4_jax.backends.base import Backend
from any4_jax.weights import QuantizedTensor


def _supports(x: Any, w: QuantizedTensor, platform: str) -> str | None:
    if platform != "cpu":
        return f"it runs on cpu, not on {platform}"
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype}, it takes float32, bfloat16 and float16"
    from cuda_ffi import registration

    return registration.why_not("cpu")


def _run(x: jax.Array, w: QuantizedTensor) -> jax.Array:
    from cuda_ffi.lut_product import lut_product

    codes = w.codes if isinstance(w.codes, tuple) else (w.codes,)
    scales, offsets = (weights.dequantize(a) if isinstance(a, QuantizedTensor) else a for a in (w.scales, w.offsets))
    return lut_product(x, codes, w.lut, scales, offsets, bits=w.bits, group_size=w.group_size)


CPU = Backend(name="cpu", supports=_supports, run=_run, prepare=lambda w: w, unprepare=lambda arrays: arrays)
