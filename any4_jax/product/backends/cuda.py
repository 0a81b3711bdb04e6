"""The CUDA product of `cuda_ffi` as a backend."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from any4_jax.product.backends.base import Backend, arrays_of, dtypes_of, why_no_codes
from any4_jax.weights import QuantizedTensor, Slice, is_operator, leaf_of


def _supports(x: Any, w: Any, platform: str) -> str | None:
    if platform != "cuda":
        return f"it runs on cuda, not on {platform}"
    leaf = leaf_of(w)
    if leaf is None:
        return why_no_codes(w)
    if leaf.bits == 8 and not leaf.uniform:
        return "the table of 256 entries is not a ramp"
    from cuda_ffi import lut_product_cuda, registration

    reason = lut_product_cuda.why_not(x.dtype, leaf.bits, leaf.group_size, leaf.shape[-1], *dtypes_of(leaf))
    return reason or registration.why_not("cuda")


def _run(x: jax.Array, w: QuantizedTensor | Slice) -> jax.Array:
    (y,) = _run_together(x, (w,))
    return y


def _run_together(x: jax.Array, ws: Sequence[QuantizedTensor | Slice]) -> tuple[jax.Array, ...]:
    from cuda_ffi.lut_product_cuda import lut_products

    leaf = leaf_of(ws[0])
    assert leaf is not None
    return lut_products(x, [_matrix(w) for w in ws], bits=leaf.bits, group_size=leaf.group_size)


def _matrix(w: QuantizedTensor | Slice) -> Any:
    from cuda_ffi.lut_product import Matrix
    from cuda_ffi.lut_product_cuda import StackedMatrix

    if isinstance(w, QuantizedTensor):
        return Matrix(*arrays_of(w))
    if is_operator(w.stack.scales) or is_operator(w.stack.offsets):
        # Decoding the scales of one matrix is less work than decoding those of all.
        return Matrix(*arrays_of(w.matrix()))
    return StackedMatrix(*arrays_of(w.stack), w.index)


def is_one_launch(m: int) -> bool:
    """Whether a product with m rows of x is a single kernel, rather than a W decoded to memory for XLA to multiply."""
    from cuda_ffi.lut_product_cuda import MOST_ROWS, on_hopper

    return m <= MOST_ROWS or on_hopper()


def launcher() -> Callable[..., None]:
    """The product on device pointers and a stream, for callers that capture launches without XLA; see
    cuda_ffi/lut_product_plain.py.

    Raises:
      RuntimeError: the library can't be used; the message says why.
    """
    from cuda_ffi import lut_product_plain

    return lut_product_plain.launcher()


CUDA = Backend(name="cuda", supports=_supports, run=_run, run_together=_run_together, takes_slices=True)
