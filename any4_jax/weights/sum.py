"""Sums of operators: outliers beside a coded matrix, binary codes, low-rank updates."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax.weights.operator import Operator, dequantize, operator, take_rows


@operator()
class Sum(Operator):
    """W = the sum of the terms.

    Attributes:
      terms: operators or arrays, each [*L, N, K].
    """

    terms: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(*L, N, K)."""
        return self.terms[0].shape


@dequantize.register
def _(w: Sum, dtype=jnp.float32) -> jax.Array:
    return functools.reduce(jnp.add, [dequantize(term) for term in w.terms]).astype(dtype)


@take_rows.register
def _(w: Sum, rows):
    return Sum(tuple(take_rows(term, rows) for term in w.terms))
