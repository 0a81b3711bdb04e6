"""The C++ product of `cuda_ffi` as a backend."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax.product.backends.base import Backend, arrays_of, why_no_codes
from any4_jax.weights import QuantizedTensor


def _supports(x: Any, w: Any, platform: str) -> str | None:
    if platform != "cpu":
        return f"it runs on cpu, not on {platform}"
    reason = why_no_codes(w)
    if reason is not None:
        return reason
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype}, it takes float32, bfloat16 and float16"
    from cuda_ffi import registration

    return registration.why_not("cpu")


def _run(x: jax.Array, w: QuantizedTensor) -> jax.Array:
    (y,) = _run_together(x, (w,))
    return y


def _run_together(x: jax.Array, ws: Sequence[QuantizedTensor]) -> tuple[jax.Array, ...]:
    from cuda_ffi.lut_product import Matrix, lut_products

    matrices = [Matrix(*arrays_of(w)) for w in ws]
    return lut_products(x, matrices, bits=ws[0].bits, group_size=ws[0].group_size)


CPU = Backend(name="cpu", supports=_supports, run=_run, run_together=_run_together)
