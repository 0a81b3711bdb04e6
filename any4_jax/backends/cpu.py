"""The C++ product of `cuda_ffi` as a backend. It reads weights as they are stored, so preparing one changes nothing."""

from collections.abc import Sequence
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
    (y,) = _run_together(x, (w,))
    return y


def _run_together(x: jax.Array, ws: Sequence[QuantizedTensor]) -> tuple[jax.Array, ...]:
    from cuda_ffi.lut_product import Matrix, lut_products

    def plain(array: Any) -> Any:
        return weights.dequantize(array) if isinstance(array, QuantizedTensor) else array

    matrices = [
        Matrix(w.codes if isinstance(w.codes, tuple) else (w.codes,), w.lut, plain(w.scales), plain(w.offsets))
        for w in ws
    ]
    return lut_products(x, matrices, bits=ws[0].bits, group_size=ws[0].group_size)


CPU = Backend(
    name="cpu",
    supports=_supports,
    run=_run,
    prepare=lambda w: w,
    unprepare=lambda arrays: arrays,
    run_together=_run_together,
)
