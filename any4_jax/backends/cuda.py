"""The CUDA product of `cuda_ffi` as a backend: it reads weights as they are stored; preparing one changes nothing."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax import weights
from any4_jax.backends.base import Backend
from any4_jax.layer import Layer
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


def _run(x: jax.Array, w: QuantizedTensor | Layer) -> jax.Array:
    (y,) = _run_together(x, (w,))
    return y


def _run_together(x: jax.Array, ws: Sequence[QuantizedTensor | Layer]) -> tuple[jax.Array, ...]:
    from cuda_ffi.lut_product_cuda import lut_products

    leaf = ws[0].stack if isinstance(ws[0], Layer) else ws[0]
    return lut_products(x, [_matrix(w) for w in ws], bits=leaf.bits, group_size=leaf.group_size)


def _matrix(w: QuantizedTensor | Layer) -> Any:
    from cuda_ffi.lut_product import Matrix
    from cuda_ffi.lut_product_cuda import StackedMatrix

    if isinstance(w, Layer) and isinstance(w.stack.scales, QuantizedTensor) | isinstance(
        w.stack.offsets, QuantizedTensor
    ):
        # Decoding the scales of one matrix is less work than of all.
        w = w.take()
    leaf = w.stack if isinstance(w, Layer) else w
    codes = leaf.codes if isinstance(leaf.codes, tuple) else (leaf.codes,)
    scales, offsets = (
        weights.dequantize(a) if isinstance(a, QuantizedTensor) else a for a in (leaf.scales, leaf.offsets)
    )
    if isinstance(w, Layer):
        return StackedMatrix(codes, leaf.lut, scales, offsets, w.index)
    return Matrix(codes, leaf.lut, scales, offsets)


def is_one_launch(m: int) -> bool:
    """Whether a product with m rows of x is one kernel here, and not W decoded to memory for XLA's product."""
    from cuda_ffi.lut_product_cuda import MOST_ROWS, on_hopper

    return m <= MOST_ROWS or on_hopper()


def launcher() -> Callable[..., None]:
    """The product on device pointers and a stream, for whoever captures launches without XLA; see
    cuda_ffi/lut_product_plain.py.

    Raises:
      RuntimeError: the library can't be used, in words.
    """
    from cuda_ffi import lut_product_plain

    return lut_product_plain.launcher()


CUDA = Backend(
    name="cuda",
    supports=_supports,
    run=_run,
    prepare=lambda w: w,
    unprepare=lambda arrays: arrays,
    run_together=_run_together,
    takes_layers=True,
)
