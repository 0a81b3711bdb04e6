"""Sums of binary planes, which kernels read as one weight (BCQ; LUT-GEMM, arXiv 2206.09557)."""

import jax.numpy as jnp

from any4_jax.weights.operator import is_operator
from any4_jax.weights.quantized_tensor import QuantizedTensor, from_codes
from any4_jax.weights.slice import Slice, leaf_of
from any4_jax.weights.sum import Sum

Plane = QuantizedTensor | Slice


def binary_planes(w: object) -> tuple[Plane, ...] | None:
    """The planes of a weight that kernels read as a sum of codes of 1 bit; None for any other.

    It is a QuantizedTensor of 1 bit, one of a stack of such, or a Sum of some that agree in their group size.
    """
    terms = w.terms if isinstance(w, Sum) else (w,)
    leaves = [leaf_of(term) for term in terms]
    sizes = {leaf.group_size if leaf is not None and leaf.bits == 1 else None for leaf in leaves}
    return terms if len(sizes) == 1 and None not in sizes else None


def bit_planes(w: QuantizedTensor) -> Sum:
    """The same matrix as a sum of binary planes, one for each bit of its codes: c = sum_i 2^i c_i.

    Plane i has the scales of `w` and the table (0, 2^i d), where d is the step of w's table; the first plane adds the
    table's first entry, and the offsets. Nothing is rounded, as long as these tables are exact in the table's dtype.

    Raises:
      ValueError: the table of `w` is no ramp, or its scales are coded themselves.
    """
    if not w.uniform or is_operator(w.scales):
        found = "scales that are coded themselves" if w.uniform else "a table that is no ramp"
        raise ValueError(f"got a weight with {found}, need integers with plain scales; quantize it by methods.Int")
    table, codes = w.lut.astype(jnp.float32), w.unpacked_codes()
    start, step = table[..., :1], table[..., 1:2] - table[..., :1]
    planes = [
        from_codes(
            (codes >> i) & 1,
            (jnp.concatenate([jnp.zeros_like(step), 2.0**i * step], axis=-1) + (start if i == 0 else 0)).astype(
                w.lut.dtype
            ),
            w.scales,
            w.offsets if i == 0 else None,
            bits=1,
            group_size=w.group_size,
            uniform=True,
        )
        for i in range(w.bits)
    ]
    return Sum(tuple(planes))
