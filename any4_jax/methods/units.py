"""Leaves that were made from weights over a power of two, put back to the size of the weights."""

import dataclasses

import jax
import jax.numpy as jnp

from any4_jax import scaling
from any4_jax.formats import ScaleRule
from any4_jax.weights import QuantizedTensor


def put_back(leaf: QuantizedTensor, w: jax.Array, unit: jax.Array, rule: ScaleRule) -> QuantizedTensor:
    """The leaf for w [N, K], from that for w / unit.

    Scales and offsets take the unit, or the table where there is no scaling. What the stored dtypes can't hold is
    infinite, NaN or, among exponents of e8m0, 255; whoever applies the method refuses these.

    Args:
      leaf: for w / unit; its scales follow `rule`.
      w: float32 [N, K].
      unit: `scaling.unit` of w, [N, 1] or [1, 1].
      rule: see any4_jax/scaling.py.
    """
    if rule == "none":
        lut = scaling.in_units(leaf.lut, unit)
        # Less than this of a table is lost in a dtype that flushes what is smaller than its least normal number.
        step = jnp.abs(w).max(axis=1 if lut.shape[0] == w.shape[0] else None, keepdims=True) / leaf.lut.shape[1]
        small = (step > 0) & (step < float(jnp.finfo(lut.dtype).tiny))
        return dataclasses.replace(leaf, lut=jnp.where(small, jnp.nan, lut))
    return dataclasses.replace(
        leaf,
        scales=scaling.marked(scaling.in_units(leaf.scales, unit), w, leaf.group_size, rule),
        offsets=None if leaf.offsets is None else scaling.in_units(leaf.offsets, unit),
    )
