"""SpQR (arXiv 2306.03078): few bits for most weights, whose scales are coded too, and a few outliers beside them."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from any4_jax import scaling, weights
from any4_jax.compensation import Grid, Outliers, Rescale, compensate
from any4_jax.methods.base import Method, Result
from any4_jax.methods.coded_scales import Coding
from any4_jax.methods.columns import Columns, columns
from any4_jax.methods.fields import Fields
from any4_jax.methods.gptq import ScalesGroups, one_leaf
from any4_jax.methods.rtn import Int
from any4_jax.methods.sensitivity import column_costs, mean_cost, without_outliers
from any4_jax.schema import Count, NotNegative, Share
from any4_jax.statistics import Drift, Gathered, Hessian, Statistic
from any4_jax.weights import QuantizedTensor

CodeBits = Literal[2, 3, 4, 5, 6, 8]


@dataclasses.dataclass(frozen=True)
class SpQR(Fields):
    """Sparse outliers beside a coded matrix: W = coded + outliers.

    As in `GPTQ`, the columns of a matrix are quantized in sequence, and each takes over the errors of those before. The
    scale and offset of a group are found when its first column comes, from the weights as compensated so far, and are
    coded themselves, each with those of neighbouring rows. A weight is an outlier where its nearest level would cost
    too much: where (w - level)^2 R_ii^2, by which the error of the layer's output grows, is above `threshold` times the
    mean over the columns of R_ii^2 times the variance of a column's weights. (H = R R^T is the damped Hessian, R upper
    triangular.) Its difference from the level is stored beside the code, which is as good as the weight itself. Weights
    without which the rest of their group would lose so much less are left out when the group is scaled.

    Differences from the paper's code: an offset is coded, not a zero point, and is found for the scale as coded; an
    outlier has the code nearest to it rather than that of zero.

    Attributes:
      inner: what gives tables, and scales groups: any method that can scale one group apart. Learned tables are learned
        without the weights that are likely outliers.
      threshold: see above; more outliers are found the smaller it is. None for no outliers.
      scale_bits, offset_bits: width of the codes of scales and of offsets; None stores them as the inner method does.
      coded_rows: how many neighbouring rows share the range of their scales' codes, and of their offsets'.
      act_order: take the columns by E[x^2], the largest first. Groups are of columns in that sequence, and a
        `PermuteInput` puts the inputs into it.
      damping, asymmetric, block, sequential: as in `GPTQ`.
      value_dtype: the dtype in which outliers are stored.
    """

    name: ClassVar[str] = "spqr"
    inner: Method = Int(3, group_size=16, zero_point="float")
    threshold: NotNegative | None = 0.25
    scale_bits: CodeBits | None = 3
    offset_bits: CodeBits | None = 3
    coded_rows: Count = 16
    act_order: bool = True
    damping: NotNegative | None = None
    asymmetric: Share = 0.5
    block: Count = 128
    value_dtype: scaling.StoredDtype = "bfloat16"
    sequential: bool = True

    @classmethod
    def paper(cls, **fields) -> "SpQR":
        """The published recipe for 4 bits a weight: little damping, and no share in earlier layers' errors. `fields`
        override it."""
        return dataclasses.replace(cls(damping=0.01, asymmetric=0.0), **fields)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        drift = (Drift(),) if self.asymmetric and self.sequential else ()
        return (Hessian(), *drift, *self.inner.needs)

    def check(self, gathered: bool) -> None:
        if not gathered:
            raise ValueError("got no statistics, spqr needs the Hessian of each layer's input; pass data")
        if not isinstance(self.inner, ScalesGroups):
            raise ValueError(
                f"got inner={self.inner.name}, which has no scale_groups to scale one group apart; pass a method that "
                "has, such as Int or Any4"
            )
        if self.scale_bits is not None and getattr(self.inner, "scale_dtype", None) == "uint8":
            raise ValueError(
                f"got scale_bits={self.scale_bits} with {self.inner.name}, whose scales are exponents; pass "
                "scale_bits=None or another inner method"
            )
        self.inner.check(gathered)

    def apply(self, w: jax.Array, gathered: Gathered | None) -> Result:
        assert gathered is not None  # `check` refuses to go on without
        drifts = self.asymmetric if Drift() in self.needs else 0.0
        given = columns(w, gathered, act_order=self.act_order, damping=self.damping, asymmetric=drifts)
        # Rows share what is made of them, so they have one unit.
        unit = scaling.unit(given.target, jnp.float32, axis=None)
        even = given._replace(target=given.target / unit)
        costs = column_costs(even)
        limit = None if self.threshold is None else self.threshold * mean_cost(even.target[:, even.order], costs)
        made = self._inner_result(even, costs, limit, gathered)
        coded, kept = self._coded(even, made.operator, costs, limit, unit)
        operator: Any = coded
        notes = dict(made.notes)
        if kept is not None:
            operator = weights.Sum((coded, weights.nonzeros((kept.astype(jnp.float32) * unit), kept.dtype)))
            notes["outlier_share"] = (kept != 0).mean(dtype=jnp.float32)
        operator = jax.tree.map(given.usable, operator)
        if self.act_order:
            operator = weights.PermuteInput(operator, given.order)
        return Result(operator, notes, given.fault(self.damping))

    def _inner_result(self, even: Columns, costs: jax.Array, limit: jax.Array | None, gathered: Gathered) -> Result:
        """What the inner method makes of the target without what is likely to become an outlier."""
        n, k = even.target.shape
        shaped = jax.eval_shape(self.inner.apply, even.target, gathered)
        leaf = one_leaf(shaped.operator, self.name, self.inner)
        if limit is None:
            return self.inner.apply(even.target, gathered)
        groups = scaling.to_groups(even.target, leaf.group_size)
        weighed = jnp.pad(costs[even.back], (0, -k % leaf.group_size)).reshape(1, -1, leaf.group_size)
        cleared = without_outliers(groups, weighed, limit, leaf.bits)
        return self.inner.apply(cleared.reshape(n, -1)[:, :k], gathered)

    def _coded(
        self, even: Columns, leaf: QuantizedTensor, costs: jax.Array, limit: jax.Array | None, unit: jax.Array
    ) -> tuple[QuantizedTensor, jax.Array | None]:
        """The leaf for columns in sequence, times `unit`, and what is kept of outliers beside it, [N, K]."""
        inner: Any = self.inner
        middle = (leaf.lut[:, :1].astype(jnp.float32) + leaf.lut[:, -1:].astype(jnp.float32)) / 2

        def scale(w: jax.Array, importance: jax.Array, lut: jax.Array) -> tuple[Any, Any]:
            if limit is not None:
                w = without_outliers(w, importance[1][None], limit, leaf.bits)
            scales, offsets = inner.scale_groups(w, importance[0], lut)
            coded = self._stored(scales, self.scale_bits)
            if offsets is None:
                return coded, None
            # The middle of the range stays where it is for the scale that is stored.
            moved = scaling.scale_values(scales) - self._values(coded, self.scale_bits)
            centred = scaling.rounded(offsets.astype(jnp.float32) + middle * moved, offsets.dtype)
            return coded, self._stored(centred, self.offset_bits)

        first = jax.eval_shape(scale, even.target[:, :1], jnp.ones((2, 1)), leaf.lut)
        groups = scaling.group_count(even.target.shape[1], leaf.group_size)
        empty = jax.tree.map(lambda one: jnp.zeros((one.shape[0], groups), one.dtype), first)
        codes, grid, kept = compensate(
            even.target[:, even.order],
            even.factored.upper,
            Grid(leaf.lut, *empty),
            jnp.arange(even.target.shape[1], dtype=jnp.int32) // leaf.group_size,
            block=self.block,
            uniform=leaf.uniform,
            rescale=Rescale(scale, jnp.stack([even.energy[even.order], costs]), leaf.group_size, self._decoded),
            outliers=None if limit is None else Outliers(_limits(limit, costs), jnp.dtype(self.value_dtype)),
        )
        scales, offsets = self._operator(grid.scales, self.scale_bits, unit), None
        if grid.offsets is not None:
            offsets = self._operator(grid.offsets, self.offset_bits, unit)
        coded = weights.from_codes(
            codes, leaf.lut, scales, offsets, bits=leaf.bits, group_size=leaf.group_size, uniform=leaf.uniform
        )
        return coded, kept

    def _coding(self, bits: int) -> Coding:
        return Coding(bits, self.coded_rows, getattr(self.inner, "scale_dtype", "bfloat16"))

    def _stored(self, values: jax.Array, bits: int | None) -> Any:
        """Scales or offsets [N, groups] as they are stored."""
        return values if bits is None else self._coding(bits).code(values.astype(jnp.float32))

    def _values(self, stored: Any, bits: int | None) -> jax.Array:
        return scaling.scale_values(stored) if bits is None else self._coding(bits).values(stored)

    def _decoded(self, scales: Any, offsets: Any) -> scaling.GroupScales:
        values = None if offsets is None else self._values(offsets, self.offset_bits)
        return scaling.GroupScales(self._values(scales, self.scale_bits), values)

    def _operator(self, stored: Any, bits: int | None, unit: jax.Array) -> Any:
        return scaling.in_units(stored, unit) if bits is None else self._coding(bits).operator(stored, unit)


def _limits(limit: jax.Array, costs: jax.Array) -> jax.Array:
    """The largest error of a weight that is no outlier, for each column, float32 [K]."""
    return jnp.where(costs > 0, jnp.sqrt(limit / jnp.where(costs > 0, costs, 1.0)), jnp.inf)
