"""Scales and offsets of groups, coded themselves in runs of neighbouring rows (SpQR, arXiv 2306.03078)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from any4_jax import formats, scaling, weights
from any4_jax.weights import Transposed


class Coded(NamedTuple):
    """Values [N, groups], for R rows and one group each a range and codes within it.

    Attributes:
      codes: uint8 [N, groups].
      scales, offsets: [ceil(N/R), groups], of the ranges.
    """

    codes: jax.Array
    scales: jax.Array
    offsets: jax.Array


@dataclasses.dataclass(frozen=True)
class Coding:
    """How values are coded: integers with a float minimum.

    Attributes:
      bits: width of a code.
      rows: R, how many rows share a range.
      dtype: of the ranges as stored.
    """

    bits: int
    rows: int
    dtype: Any

    def code(self, values: jax.Array) -> Coded:
        """The nearest codes for values float32 [N, groups]."""
        rows = min(self.rows, values.shape[0])
        made = scaling.group_scales(values.T, rows, rule="asymmetric", bits=self.bits, dtype=jnp.dtype(self.dtype))
        codes = formats.nearest(scaling.normalize(values.T, *made, rows), self._table(), uniform=True)
        assert made.offsets is not None
        return Coded(codes.T, made.scales.T, made.offsets.T)

    def values(self, coded: Coded) -> jax.Array:
        """What codes stand for, float32 [N, groups]."""
        n = coded.codes.shape[0]
        scales, offsets = (
            scaling.expand(of_runs.astype(jnp.float32).T, min(self.rows, n), n).T
            for of_runs in (coded.scales, coded.offsets)
        )
        return self._table()[0].astype(jnp.float32)[coded.codes.astype(jnp.int32)] * scales + offsets

    def operator(self, coded: Coded, unit: jax.Array) -> Transposed:
        """The operator [N, groups] for values times a power of two `unit`."""
        scales, offsets = (scaling.in_units(of_runs.T, unit) for of_runs in (coded.scales, coded.offsets))
        rows = min(self.rows, coded.codes.shape[0])
        leaf = weights.from_codes(
            coded.codes.T, self._table(), scales, offsets, bits=self.bits, group_size=rows, uniform=True
        )
        return Transposed(leaf)

    def _table(self) -> jax.Array:
        return jnp.asarray([formats.ramp(self.bits)], jnp.bfloat16)
