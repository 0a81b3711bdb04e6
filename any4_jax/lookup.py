"""Rows of a weight, decoded: what an embedding reads of its table."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from any4_jax.matmul import Prepared, unprepare
from any4_jax.weights import LowRank, PermuteInput, QuantizedTensor, QuantizeInput, ScaleInput, Sum, dequantize


def lookup(w, rows: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """W[rows] of an operator or array [N, K], of which no other row is decoded.

    Args:
      w: an operator or array [N, K].
      rows: int [...], from 0 to N - 1; others are clipped, as jax.numpy.take does in its "clip" mode.
      dtype: of the result; computed in float32 and rounded once.

    Returns:
      [..., K].
    """
    flat = rows.reshape(-1)
    return dequantize(take_rows(w, flat), dtype).reshape(*rows.shape, w.shape[-1])


def take_rows(w, rows: jax.Array):
    """The operator [R, K] of some rows of an operator or array [N, K]; rows is int [R]."""
    if isinstance(w, Prepared):
        return take_rows(unprepare(w), rows)
    if isinstance(w, jax.Array):
        return jnp.take(w, rows, axis=0, mode="clip")
    if isinstance(w, QuantizedTensor):
        n = w.shape[0]
        # A table of its own for each row has N of them; one for the matrix, and one row of everything, has 1.
        taken = {
            field: jax.tree.map(lambda leaf: leaf if leaf.shape[0] != n else take_rows(leaf, rows), getattr(w, field))
            for field in ("codes", "lut")
        }
        scaled = {field: _taken(getattr(w, field), rows) for field in ("scales", "offsets")}
        return dataclasses.replace(w, **taken, **scaled)
    if isinstance(w, Sum):
        return Sum(tuple(take_rows(term, rows) for term in w.terms))
    if isinstance(w, LowRank):
        return dataclasses.replace(w, b=take_rows(w.b, rows))
    if isinstance(w, ScaleInput | PermuteInput | QuantizeInput):
        return dataclasses.replace(w, inner=take_rows(w.inner, rows))
    raise TypeError(f"got a weight of type {type(w).__name__}, need an array or an operator; dequantize it first")


def _taken(stored, rows: jax.Array):
    return None if stored is None else take_rows(stored, rows)
