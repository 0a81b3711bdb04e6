"""Scales that are coded themselves, along the rows that they scale, as kernels read them."""

from typing import Any

import jax.numpy as jnp

from any4_jax.weights import QuantizedTensor, Transposed, is_operator


def coded_scales(w: QuantizedTensor) -> list[Any] | None:
    """The scales of a weight, and its offsets where it has any, each a `cuda_ffi.coded_product.Turned`; None where not
    all are coded in a form that a kernel reads."""
    stored = [w.scales] if w.offsets is None else [w.scales, w.offsets]
    return [_turned(each.inner) for each in stored] if all(map(_is_turned, stored)) else None


def _is_turned(scales: Any) -> bool:
    from cuda_ffi.coded_product import BITS, RUN

    leaf = scales.inner if isinstance(scales, Transposed) else None
    if not isinstance(leaf, QuantizedTensor) or leaf.bits not in BITS or leaf.group_size % RUN != 0:
        return False
    ranges = leaf.scales, leaf.offsets
    floats = all(not is_operator(a) and a is not None and jnp.issubdtype(a.dtype, jnp.floating) for a in ranges)
    return floats and leaf.uniform and leaf.lut.shape[-2] == 1


def _turned(leaf: QuantizedTensor) -> Any:
    from cuda_ffi.coded_product import Turned

    assert leaf.offsets is not None
    return Turned(leaf.planes, leaf.lut, leaf.scales, leaf.offsets, leaf.group_size)
