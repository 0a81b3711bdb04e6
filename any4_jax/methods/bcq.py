"""BCQ: weights as a sum of scaled signs (LUT-GEMM, arXiv 2206.09557; alternating least squares of arXiv 1802.00150)."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from any4_jax import scaling, weights
from any4_jax.formats import ScaleRule
from any4_jax.methods import binary_coding
from any4_jax.methods.base import Result
from any4_jax.methods.binary_coding import Coding
from any4_jax.methods.fields import Fields
from any4_jax.schema import Count, Index
from any4_jax.statistics import Gathered, Moments, Statistic

_CHUNK_ROWS = 64
"""Rows worked on at a time, for every matrix the same number: see any4.py."""

_NEGLIGIBLE = 2.0**-20
"""A scale below this share of the group's largest weight is the rounding of float32, and becomes zero."""


@dataclasses.dataclass(frozen=True)
class BCQ(Fields):
    """Binary-coding quantization: W[n, k] = sum_i a_i[n, k // G] * b_i[n, k], with b_i in {-1, +1}.

    Scales start greedily, one plane after another; then rounds of least squares alternate between the signs that are
    nearest for the scales, and the scales that are best for the signs. That is as published, but for two things: all of
    it is in float32, where the published code keeps residuals in the weights' dtype, and zero has the sign +1. At the
    end the scales are rounded as they are stored, and each weight takes the nearest level of those.

    The result is a `Sum` of `bits` leaves of 1 bit. Each is a QuantizedTensor with the table (-1, 1) and the scales of
    its plane, so that the law of the leaf holds as it stands, and so does all that relies on it: packing, kernels,
    checkpoints, shards, gradients of scales. One leaf of `bits` bits can't hold these weights: the ratios of a group's
    scales differ from group to group, where a leaf has one table for a row; a scale for each plane would be another law
    for every kernel. What the sum could cost, a product for each plane, it doesn't: backends read a sum of planes as
    one weight (`any4_jax.weights.binary_planes`).

    Attributes:
      bits: the number of planes, 1 to 4.
      group_size: G; larger than K means the whole row.
      rounds: of alternating least squares. With one plane and no offset the greedy start is the optimum.
      offset: add a learned offset for each group, which the published form lacks: without it the levels of a group are
        symmetric about zero. It takes 16 / G more bits per weight, an eighth of a bit in groups of 128, is stored with
        the first plane, and costs the product one more term a group.
      sample_weight: how much an input counts in the error: "second_moment" is E[x^2], None is 1, as published.
      scale_dtype: the dtype in which scales and offsets are stored.
    """

    name: ClassVar[str] = "bcq"
    sequential: ClassVar[bool] = False
    bits: Literal[1, 2, 3, 4] = 4
    group_size: Count = 128
    rounds: Index = 30
    offset: bool = False
    sample_weight: Literal["second_moment"] | None = None
    scale_dtype: scaling.StoredDtype = "bfloat16"

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return () if self.sample_weight is None else (Moments(),)

    def check(self, gathered: bool) -> None:
        if self.sample_weight is not None and not gathered:
            raise ValueError(
                f"got sample_weight={self.sample_weight!r} without statistics of the layer's input; pass stats "
                "(any4_jax.calibrate gathers them) or sample_weight=None"
            )

    def apply(self, w: jax.Array, gathered: Gathered | None) -> Result:
        n, k = w.shape
        group_size = min(self.group_size, k)
        h = jnp.pad(self._importance(gathered, k), (0, -k % group_size)).reshape(-1, group_size)
        chunks = -(-n // _CHUNK_ROWS)
        padded = jnp.pad(w, ((0, chunks * _CHUNK_ROWS - n), (0, 0)), mode="edge").reshape(chunks, _CHUNK_ROWS, k)
        made = jax.lax.map(lambda rows: self._coded(rows, h), padded)
        patterns, scales, offsets = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], made)
        table = jnp.asarray([[-1, 1]], jnp.bfloat16)
        planes = [
            weights.from_codes(
                (patterns[:, :k] >> i) & 1,
                table,
                scales[..., i],
                offsets if i == 0 else None,
                bits=1,
                group_size=group_size,
                uniform=True,
            )
            for i in range(self.bits)
        ]
        return Result(weights.Sum(tuple(planes)))

    def _importance(self, gathered: Gathered | None, k: int) -> jax.Array:
        """How much each input counts, float32 [K], at most 1 and never zero: a group of inputs that are always zero
        has scales too."""
        if self.sample_weight is None or gathered is None:
            return jnp.ones(k)
        importance = gathered[Moments()].second_moment
        floor = jnp.maximum(importance.max() * _NEGLIGIBLE, jnp.finfo(jnp.float32).tiny)
        return jnp.maximum(importance, floor) / jnp.maximum(importance.max(), floor)

    def _coded(self, w: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """For some rows [R, K]: patterns uint8 [R, groups * G], and scales [R, groups, q] and offsets [R, groups] as
        they are stored; h [groups, G] is zero beyond K."""
        dtype, group_size = jnp.dtype(self.scale_dtype), h.shape[1]
        groups = scaling.to_groups(w, group_size)
        unit = scaling.unit(groups, dtype)
        even = groups / unit
        coding = binary_coding.greedy(even, h, self.bits, offset=self.offset)
        if self.bits > 1 or self.offset:
            coding = jax.lax.fori_loop(
                0, self.rounds, lambda _, c: binary_coding.refine(even, h, c, offset=self.offset), coding
            )
        stored = self._rounded(coding, even, dtype)
        patterns = binary_coding.nearest(even, stored).astype(jnp.uint8).reshape(w.shape[0], -1)
        scales = scaling.in_units(stored.scales.astype(dtype), unit)
        rule: ScaleRule = "asymmetric" if self.offset else "absmax"
        scales = scales.at[..., 0].set(scaling.marked(scales[..., 0], w, group_size, rule))
        offsets = scaling.in_units(stored.offset.astype(dtype), unit[..., 0]) if self.offset else None
        return patterns, scales, offsets

    def _rounded(self, coding: Coding, w: jax.Array, dtype) -> Coding:
        """The coding of groups w [..., g] as float32 values that are stored in `dtype`, without scales that are the
        rounding of float32 alone."""
        largest = jnp.abs(w).max(axis=-1)
        extent = w.max(axis=-1) - w.min(axis=-1) if self.offset else largest
        first = (jnp.arange(self.bits) == 0) & (extent > 0)[..., None]
        kept = first | (coding.scales > _NEGLIGIBLE * largest[..., None])
        scales = jnp.where(kept, coding.scales, 0.0)
        return Coding(*(scaling.rounded(part, dtype).astype(jnp.float32) for part in (scales, coding.offset)))
