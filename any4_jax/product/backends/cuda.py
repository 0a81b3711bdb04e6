"""The CUDA products of `cuda_ffi` as a backend: of floats, and of rounded inputs by bytes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from any4_jax.product.backends.base import Backend, arrays_of, dtypes_of, why_no_codes
from any4_jax.product.backends.coded_scales import coded_scales
from any4_jax.product.quantized_input import why_no_bytes
from any4_jax.weights import (
    QuantizedTensor,
    QuantizeInput,
    Slice,
    Sparse,
    binary_planes,
    is_operator,
    leaf_of,
    with_outliers,
)

MOST_ROUNDED_ROWS = 16
"""The most rows of x, rounded as the user asked, that the kernel takes: an estimate, not measured. It reads the weight
anew for each two; a product of floats decodes it once."""


def _supports(x: Any, w: Any, platform: str) -> str | None:
    if platform != "cuda":
        return f"it runs on cuda, not on {platform}"
    planes = binary_planes(w)
    if planes is not None:
        return _why_not_planes(x, planes)
    if isinstance(w, Sparse):
        return _why_not_entries(x)
    outliers = with_outliers(w)
    if outliers is not None:
        return _why_not_coded(x, outliers[0])
    rounded = isinstance(w, QuantizeInput)
    reason = why_no_bytes(w) if rounded else why_no_codes(w)
    if reason is not None:
        return reason
    leaf = leaf_of(w.inner if rounded else w)
    assert leaf is not None
    from cuda_ffi import lut_product_cuda, registration

    if rounded:
        by_group = "x has a scale for each row or for all of it, it takes one for each group of inputs"
        reason = _why_not_as_bytes(x, leaf) if w.per == "group" else by_group
        if reason is None and _rows(x) > MOST_ROUNDED_ROWS:
            reason = f"x has {_rows(x)} rows, it takes at most {MOST_ROUNDED_ROWS} that are rounded to bytes"
    elif leaf.bits == 8 and not leaf.uniform:
        return "the table of 256 entries is not a ramp"
    else:
        reason = lut_product_cuda.why_not(x.dtype, leaf.bits, leaf.group_size, leaf.shape[-1], *dtypes_of(leaf))
    return reason or registration.why_not("cuda")


def _why_not_planes(x: Any, planes: Sequence[Any]) -> str | None:
    from cuda_ffi import binary_product_cuda, registration

    for leaf in filter(None, map(leaf_of, planes)):
        reason = binary_product_cuda.why_not(
            x.dtype, _rows(x), len(planes), leaf.group_size, leaf.shape[-2:], *dtypes_of(leaf)
        )
        if reason is not None:
            return reason
    return registration.why_not("cuda")


def _why_not_entries(x: Any) -> str | None:
    from cuda_ffi import registration, sparse_product_cuda

    return sparse_product_cuda.why_not(x.dtype, _rows(x)) or registration.why_not("cuda")


def _why_not_coded(x: Any, w: QuantizedTensor | Slice) -> str | None:
    """Why the kernel that decodes scales too doesn't take a weight."""
    from cuda_ffi import coded_product_cuda, registration

    leaf = leaf_of(w)
    assert leaf is not None
    scales = coded_scales(leaf)
    if scales is None:
        return "it multiplies by a coded matrix and by the entries beside it at once where scales are coded too"
    shape = leaf.shape[-2:]
    reason = coded_product_cuda.why_not(x.dtype, _rows(x), leaf.bits, leaf.group_size, shape, leaf.lut.dtype, scales)
    return reason or registration.why_not("cuda")


def _rows(x: Any) -> int:
    return math.prod(x.shape[:-1])


def _why_not_as_bytes(x: Any, leaf: QuantizedTensor) -> str | None:
    from cuda_ffi import byte_product_cuda

    _, scales, offsets = dtypes_of(leaf)
    n, k = leaf.shape[-2:]
    return byte_product_cuda.why_not(x.dtype, leaf.bits, leaf.group_size, (n, k), leaf.lut.dtype, scales, offsets)


def _rounding(x: Any, w: QuantizedTensor | Slice | QuantizeInput) -> Any:
    """How x is rounded to multiply bytes; None where it multiplies as it is."""
    from cuda_ffi import byte_product_cuda

    if isinstance(w, QuantizeInput):
        return "int8"
    leaf = leaf_of(w)
    assert leaf is not None
    few = _rows(x) <= byte_product_cuda.MOST_ROWS
    return "int16" if few and _why_not_as_bytes(x, leaf) is None else None


def _run(x: jax.Array, w: Any) -> jax.Array:
    if isinstance(w, Sparse):
        from cuda_ffi.sparse_product_cuda import sparse_product

        return sparse_product(x, w.ends, w.columns, w.values)
    outliers = with_outliers(w)
    if outliers is not None:
        return _run_coded(x, *outliers)
    if not isinstance(w, QuantizeInput) and leaf_of(w) is not None and _why_not_coded(x, w) is None:
        return _run_coded(x, w)
    (y,) = _run_together(x, (w,))
    return y


def _run_coded(x: jax.Array, w: QuantizedTensor | Slice, entries: Sparse | None = None) -> jax.Array:
    from cuda_ffi.coded_product_cuda import coded_product

    leaf = w.matrix() if isinstance(w, Slice) else w
    scales = coded_scales(leaf)
    assert scales is not None
    few = None if entries is None else (entries.ends, entries.columns, entries.values)
    offsets = scales[1] if len(scales) > 1 else None
    return coded_product(x, leaf.planes, leaf.lut, scales[0], offsets, few, uniform=leaf.uniform)


def _run_planes(x: jax.Array, planes: Sequence[QuantizedTensor | Slice]) -> jax.Array:
    from cuda_ffi.binary_product_cuda import binary_product
    from cuda_ffi.lut_product import Matrix

    leaves = [plane.matrix() if isinstance(plane, Slice) else plane for plane in planes]
    return binary_product(x, [Matrix(*arrays_of(leaf)) for leaf in leaves], group_size=leaves[0].group_size)


def _run_together(x: jax.Array, ws: Sequence[Any]) -> tuple[jax.Array, ...]:
    sums = [planes for w in ws if (planes := binary_planes(w)) is not None]
    if sums:
        return tuple(_run_planes(x, planes) for planes in sums)
    if len(ws) > 1 and any(not isinstance(w, QuantizeInput) and _why_not_coded(x, w) is None for w in ws):
        return tuple(_run(x, w) for w in ws)
    from cuda_ffi.byte_product_cuda import byte_products
    from cuda_ffi.lut_product_cuda import lut_products

    first = leaf_of(ws[0].inner if isinstance(ws[0], QuantizeInput) else ws[0])
    assert first is not None
    roundings = [_rounding(x, w) for w in ws]
    ys: dict[int, jax.Array] = {}
    for rounding in dict.fromkeys(roundings):
        places = [i for i, of_weight in enumerate(roundings) if of_weight == rounding]
        matrices = [_matrix(ws[i]) for i in places]
        if rounding is None:
            products = lut_products(x, matrices, bits=first.bits, group_size=first.group_size)
        else:
            products = byte_products(x, matrices, group_size=first.group_size, rounding=rounding)
        ys |= zip(places, products, strict=True)
    return tuple(ys[i] for i in range(len(ws)))


def _matrix(w: QuantizedTensor | Slice | QuantizeInput) -> Any:
    from cuda_ffi.lut_product import Matrix
    from cuda_ffi.lut_product_cuda import StackedMatrix

    if isinstance(w, QuantizeInput):
        return _matrix(w.inner)
    if isinstance(w, Slice) and (is_operator(w.stack.scales) or is_operator(w.stack.offsets)):
        # Decoding the scales of one matrix is less work than decoding those of all.
        w = w.matrix()
    leaf = w if isinstance(w, QuantizedTensor) else w.stack
    arrays = arrays_of(leaf, as_stored=True)
    return Matrix(*arrays) if isinstance(w, QuantizedTensor) else StackedMatrix(*arrays, w.index)


def _detail(x: Any, w: Any) -> str | None:
    if binary_planes(w) is not None:
        return "signs multiply x on tensor cores, which takes one operation a code"
    if isinstance(w, Sparse):
        return None
    if not isinstance(w, QuantizeInput) and _why_not_coded(x, (with_outliers(w) or (w,))[0]) is None:
        return "scales are decoded with the codes" + ("" if with_outliers(w) is None else ", beside the entries")
    rounding = _rounding(x, w)
    return None if rounding is None else f"x is rounded to {rounding}, which multiplies the table's bytes"


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


CUDA = Backend(name="cuda", supports=_supports, run=_run, run_together=_run_together, takes_slices=True, detail=_detail)
