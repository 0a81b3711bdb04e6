"""The C++ products of `cuda_ffi` as a backend: of floats, and of rounded inputs by bytes."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax.product.backends.base import Backend, arrays_of, dtypes_of, why_no_codes
from any4_jax.product.backends.coded_scales import coded_scales
from any4_jax.product.quantized_input import input_grid, why_no_bytes
from any4_jax.weights import (
    QuantizedTensor,
    QuantizeInput,
    Sparse,
    binary_planes,
    leaf_of,
)


def _supports(x: Any, w: Any, platform: str) -> str | None:
    if platform != "cpu":
        return f"it runs on cpu, not on {platform}"
    reason = None if binary_planes(w) else why_no_bytes(w) if isinstance(w, QuantizeInput) else why_no_codes(w)
    if reason is not None and not isinstance(w, Sparse):
        return reason
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype}, it takes float32, bfloat16 and float16"
    from cuda_ffi import registration

    return registration.why_not("cpu")


def _run(x: jax.Array, w: QuantizedTensor | QuantizeInput | Sparse) -> jax.Array:
    if isinstance(w, Sparse):
        from cuda_ffi.sparse_product import sparse_product

        return sparse_product(x, w.ends, w.columns, w.values)
    if isinstance(w, QuantizedTensor) and (scales := coded_scales(w)) is not None:
        return _run_coded(x, w, scales)
    (y,) = _run_together(x, (w,))
    return y


def _run_together(x: jax.Array, ws: Sequence[QuantizedTensor | QuantizeInput]) -> tuple[jax.Array, ...]:
    from cuda_ffi.byte_product import Rounding, byte_products
    from cuda_ffi.lut_product import Matrix, lut_products

    first = ws[0]
    if len(ws) > 1 and any(isinstance(w, QuantizedTensor) and coded_scales(w) for w in ws):
        return tuple(_run(x, w) for w in ws)
    sums = [planes for w in ws if (planes := binary_planes(w)) is not None]
    if sums:
        return _sums_of_planes(x, sums)
    leaves = [w.inner if isinstance(w, QuantizeInput) else w for w in ws]
    matrices = [Matrix(*arrays_of(leaf, as_stored=isinstance(first, QuantizeInput))) for leaf in leaves]
    bits, group_size = leaves[0].bits, leaves[0].group_size
    if not isinstance(first, QuantizeInput):
        return lut_products(x, matrices, bits=bits, group_size=group_size)
    rounding = Rounding(first.bits, first.symmetric, by_row=first.per != "group")
    return byte_products(x, matrices, bits=bits, group_size=group_size, rounding=rounding, grid=grid_of_all(x, first))


def _sums_of_planes(x: jax.Array, sums: Sequence[Sequence[Any]]) -> tuple[jax.Array, ...]:
    from cuda_ffi.binary_product import binary_products
    from cuda_ffi.lut_product import Matrix

    matrices = [[Matrix(*arrays_of(plane)) for plane in planes] for planes in sums]
    return binary_products(x, matrices, group_size=sums[0][0].group_size)


def _run_coded(x: jax.Array, w: QuantizedTensor, scales: Sequence[Any]) -> jax.Array:
    from cuda_ffi.coded_product import coded_product

    offsets = scales[1] if len(scales) > 1 else None
    lut = w.lut.astype(dtypes_of(w).lut)
    return coded_product(x, w.planes, lut, scales[0], offsets, bits=w.bits, group_size=w.group_size)


def grid_of_all(x: jax.Array, w: QuantizeInput) -> jax.Array | None:
    """The one grid [1, 3] of all of x; None where the kernel finds those of its rows or groups."""
    if w.per != "tensor":
        return None
    return jnp.concatenate(input_grid(x.astype(jnp.float32), w), axis=-1).reshape(1, 3)


def _detail(x: Any, w: Any) -> str | None:
    if isinstance(w, QuantizeInput):
        return "x is rounded to bytes, which multiply the weight's bytes"
    planes = binary_planes(w)
    leaf = leaf_of(planes[0]) if planes else None
    if planes is None or leaf is None:
        return None
    from cuda_ffi.binary_product import why_not_tables

    reason = why_not_tables(math.prod(x.shape[:-1]), len(planes), leaf.shape[-1], leaf.group_size)
    if reason is None:
        return "codes look up sums of inputs in tables, which takes fewer operations than to decode them"
    return f"codes are decoded: {reason}"


CPU = Backend(name="cpu", supports=_supports, run=_run, run_together=_run_together, detail=_detail)
