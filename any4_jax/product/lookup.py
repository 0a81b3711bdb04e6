"""Rows of a weight, decoded: what an embedding reads from its table."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from any4_jax.weights import dequantize, take_rows


def lookup(w: Any, rows: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """W[rows] of an operator or array [N, K], without decoding any other row.

    Args:
      w: an operator or array [N, K].
      rows: int [...], from 0 to N - 1; others are clipped, as jax.numpy.take does in its "clip" mode.
      dtype: of the result; computed in float32 and rounded once.

    Returns:
      [..., K] in `dtype`.

    Raises:
      TypeError: `w` is not an operator.
    """
    flat = rows.reshape(-1)
    return dequantize(take_rows(w, flat), dtype).reshape(*rows.shape, w.shape[-1])
