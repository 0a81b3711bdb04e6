"""Round to nearest: fixed tables, and group scales from each group's extremes, or from a narrower range."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from any4_jax import formats, scaling, weights
from any4_jax.methods.base import Result
from any4_jax.methods.clipping import clipped_scales
from any4_jax.methods.fields import Fields
from any4_jax.methods.units import put_back
from any4_jax.schema import Count
from any4_jax.statistics import Gathered, Moments, Statistic


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundToNearest(Fields):
    """What the fixed-table methods share: scale each group and take the nearest level.

    Attributes:
      group_size: G; larger than K means the whole row.
      clip: narrow the range of each group where that lowers its error, in which each input counts by E[x^2] if there
        are statistics, else by 1.
      scale_dtype: stored dtype of scales and offsets.
      table_dtype: stored dtype of the table.
    """

    sequential: ClassVar[bool] = False
    group_size: Count = 128
    clip: bool = False
    scale_dtype: scaling.StoredDtype = "bfloat16"
    table_dtype: scaling.StoredDtype = "bfloat16"

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return (Moments(),) if self.clip else ()

    def format(self, k: int) -> formats.Format:
        """The format for rows of K = `k` weights."""
        raise NotImplementedError

    def check(self, gathered: bool) -> None:
        del gathered  # no two fields contradict each other

    def scale_groups(self, w: jax.Array, importance: jax.Array, lut: jax.Array) -> scaling.GroupScales:
        """Scales and offsets [N, ceil(K/G)] of weights [N, K] for the table."""
        fmt, group_size, dtype = self.format(w.shape[1]), min(self.group_size, w.shape[1]), jnp.dtype(self.scale_dtype)

        def scale(w: jax.Array) -> scaling.GroupScales:
            return scaling.group_scales(w, group_size, rule=fmt.rule, bits=fmt.bits, dtype=dtype)

        if not self.clip:
            return scale(w)
        return clipped_scales(scale, w, importance, lut, group_size=group_size, uniform=fmt.uniform)

    def apply(self, w: jax.Array, gathered: Gathered | None) -> Result:
        k = w.shape[1]
        fmt = self.format(k)
        unit = scaling.unit(w, jnp.dtype(self.scale_dtype))
        table = jnp.asarray([fmt.levels], jnp.dtype(self.table_dtype))
        importance = jnp.ones(k, jnp.float32)
        if self.clip and gathered is not None:
            importance = gathered[Moments()].second_moment
        scales, offsets = self.scale_groups(w / unit, importance, table)
        leaf = weights.encode(
            w / unit, table, scales, offsets, bits=fmt.bits, group_size=min(self.group_size, k), uniform=fmt.uniform
        )
        notes = {"clip_weight": "None" if gathered is None else "second_moment"} if self.clip else {}
        return Result(put_back(leaf, w, unit, fmt.rule), notes)


@dataclasses.dataclass(frozen=True)
class Int(RoundToNearest):
    """Integers of 2, 3, 4, 5, 6 or 8 bits.

    Attributes:
      bits: width of a code.
      symmetric: scale by max|w|, without an offset.
      zero_point: with "float", the group's minimum is a level (any4's int4); with "integer", zero is a level, as in
        GPTQ, AWQ and most kernels. Ignored if `symmetric`.
    """

    name: ClassVar[str] = "int"
    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    symmetric: bool = False
    zero_point: Literal["integer", "float"] = "integer"

    def format(self, k: int) -> formats.Format:
        if self.symmetric:
            return formats.integer(self.bits, rule="symmetric")
        return formats.integer(self.bits, rule="integer_zero" if self.zero_point == "integer" else "asymmetric")


@dataclasses.dataclass(frozen=True)
class NF4(RoundToNearest):
    """NormalFloat of QLoRA (arXiv 2305.14314): quantiles of a normal, scaled by the group's max|w|.

    Groups run along a row; bitsandbytes' blocks run over the flattened matrix, and the two agree where G divides K.
    """

    name: ClassVar[str] = "nf4"

    def format(self, k: int) -> formats.Format:
        return formats.NF4


@dataclasses.dataclass(frozen=True)
class FP4(RoundToNearest):
    """The 4-bit float table of bitsandbytes, scaled by the group's max|w|."""

    name: ClassVar[str] = "fp4"

    def format(self, k: int) -> formats.Format:
        return formats.FP4


@dataclasses.dataclass(frozen=True)
class AF4(RoundToNearest):
    """AbnormalFloat (arXiv 2306.06965): the table that suits the group size."""

    name: ClassVar[str] = "af4"

    def format(self, k: int) -> formats.Format:
        return formats.af4(min(self.group_size, k))


@dataclasses.dataclass(frozen=True)
class MX4(RoundToNearest):
    """MXFP4 (OCP Microscaling Formats v1.0): e2m1 elements under a power-of-two scale of 8 bits.

    Attributes:
      scale: "round" rounds the group's max|w| before it takes the exponent, as any4's reference does; "ocp" takes the
        floor, as the specification does.
      group_size: G; the specification's blocks have 32 weights, and other sizes are stored as any other format's.
      scale_dtype: "uint8", for the exponents of OCP's e8m0; nothing else is allowed.
    """

    name: ClassVar[str] = "mx4"
    scale: Literal["round", "ocp"] = "round"
    group_size: Count = dataclasses.field(default=32, kw_only=True)
    scale_dtype: Literal["uint8"] = dataclasses.field(default="uint8", kw_only=True)  # type: ignore[assignment]

    def format(self, k: int) -> formats.Format:
        return formats.mx4(self.scale)
