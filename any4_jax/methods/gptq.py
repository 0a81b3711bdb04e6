"""GPTQ (arXiv 2210.17323): codes that compensate each other's errors, on the tables and scales of any other method."""

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from any4_jax import scaling, weights
from any4_jax.compensation import Grid, Rescale, compensate
from any4_jax.methods.any4 import Any4
from any4_jax.methods.base import Method, Result
from any4_jax.methods.columns import Columns, columns
from any4_jax.methods.fields import Fields
from any4_jax.refit import Fit
from any4_jax.refit.hessian import improve
from any4_jax.schema import Count, Index, NotNegative, Share
from any4_jax.statistics import Drift, Gathered, Hessian, Statistic
from any4_jax.weights import QuantizedTensor

_SWEEPS = 2
"""How often a round of refits visits each column for a better code."""


@runtime_checkable
class ScalesGroups(Protocol):
    """A method that can scale groups of weights apart from the rest of their rows, for given tables."""

    def scale_groups(self, w: jax.Array, importance: jax.Array, lut: jax.Array) -> scaling.GroupScales:
        """Scales and offsets [N, ceil(K/G)], in stored dtypes, of weights w float32 [N, K] for tables lut
        [N or 1, 2**bits], where the error of each input counts by importance float32 [K]."""
        ...


@dataclasses.dataclass(frozen=True)
class GPTQ(Fields):
    """Error compensation: the inner method gives tables, scales and offsets, and GPTQ the codes.

    The columns of a matrix are quantized in sequence. Each takes the code that is nearest once the errors of the
    columns before it are compensated, as far as inputs that occur together allow (any4_jax/compensation). What counts
    is the error of the layer's output, tr((W - Q) H (W - Q)^T) with H = E[x x^T]. The weights of inputs that were
    always zero are rounded to nearest.

    Attributes:
      inner: what gives tables and scales: any method whose result is one table-coded matrix.
      act_order: take the columns by E[x^2], the largest first. Where groups are static, this costs nothing later; else
        groups are of columns in that sequence, and a `PermuteInput` puts the inputs into it.
      static_groups: scale all groups before any weight is changed, by the inner method. Else a group's scale and offset
        are found when its first column comes, from the weights as compensated so far.
      damping: the share of the mean E[x^2] that is added to the diagonal of H. With None it follows the number of
        tokens T: (1 + sqrt(K / T))^2 - 1. By so much the largest eigenvalue of H would be too large if the tokens were
        independent and the K inputs alike (Marchenko and Pastur). Published GPTQ adds 0.01, which fits few tokens too
        closely: with 8,000 tokens of another domain, learned tables are then better rounded to nearest.
      asymmetric: what share of the earlier layers' errors the weights take over. In place of W the matrix
        W + asymmetric * W E[(x_float - x) x^T] H^-1 is quantized, which for inputs x of the model as quantized so far
        gives what W gives for those of the float model (GPTAQ, arXiv 2504.02692, which takes over all).
      block: columns between two updates from all columns before. It changes nothing beyond rounding.
      refits: rounds of least squares of tables, scales and offsets under H, each followed by coordinate descent of the
        codes (any4_jax.refit.hessian). A table that rows share stays as it is. They need static groups.
      sequential: gather statistics from the model as quantized so far.
    """

    name: ClassVar[str] = "gptq"
    inner: Method = Any4()
    act_order: bool = True
    static_groups: bool = True
    damping: NotNegative | None = None
    asymmetric: Share = 0.5
    block: Count = 128
    refits: Index = 0
    sequential: bool = True

    @property
    def needs(self) -> tuple[Statistic, ...]:
        drift = (Drift(),) if self.asymmetric and self.sequential else ()
        return (Hessian(), *drift, *self.inner.needs)

    def check(self, gathered: bool) -> None:
        if not gathered:
            raise ValueError("got no statistics, gptq needs the Hessian of each layer's input; pass data")
        if not self.static_groups and not isinstance(self.inner, ScalesGroups):
            raise ValueError(
                f"got static_groups=False with {self.inner.name}, which has no scale_groups to scale one group apart; "
                "pass static_groups=True"
            )
        if self.refits and not self.static_groups:
            raise ValueError(
                f"got refits={self.refits} with static_groups=False, refits move scales of all groups at once; pass "
                "static_groups=True or refits=0"
            )
        self.inner.check(gathered)

    def apply(self, w: jax.Array, gathered: Gathered | None) -> Result:
        assert gathered is not None  # `check` refuses to go on without
        drifts = self.asymmetric if Drift() in self.needs else 0.0
        given = columns(w, gathered, act_order=self.act_order, damping=self.damping, asymmetric=drifts)
        made = self.inner.apply(given.target, gathered)
        leaf = one_leaf(made.operator, self.name, self.inner)
        moving = not self.static_groups and leaf.group_size < w.shape[1]
        leaf = (self._with_groups_as_they_come if moving else self._with_static_groups)(given, leaf)
        operator: Any = jax.tree.map(given.usable, leaf)
        if self.act_order and moving:
            operator = weights.PermuteInput(operator, given.order)
        return Result(operator, dict(made.notes), given.fault(self.damping))

    def _with_static_groups(self, given: Columns, leaf: QuantizedTensor) -> QuantizedTensor:
        """The leaf with codes that compensate each other, and refitted if that is asked for."""
        w, order = given.target, given.order
        unit = scaling.unit(w, jnp.float32)
        offsets = None if leaf.offsets is None else _plain(leaf.offsets).astype(jnp.float32) / unit
        grid = Grid(leaf.lut, scaling.scale_values(_plain(leaf.scales)) / unit, offsets)
        codes = compensate(
            (w / unit)[:, order],
            given.factored.upper,
            grid,
            order // leaf.group_size,
            block=self.block,
            uniform=leaf.uniform,
        ).codes
        codes, fit = codes[:, given.back], Fit(leaf.lut, leaf.scales, leaf.offsets)
        if self.refits:
            fit, codes = self._refitted(w, given.hessian, fit, codes, leaf)
        return _leaf_of(codes, fit, leaf)

    def _with_groups_as_they_come(self, given: Columns, leaf: QuantizedTensor) -> QuantizedTensor:
        """The leaf for columns in sequence, with groups of that sequence rather than of neighbours in the matrix."""
        inner: Any = self.inner
        w, order = given.target, given.order
        scales, offsets = _plain(leaf.scales), None if leaf.offsets is None else _plain(leaf.offsets)
        unit = scaling.unit(w, scales.dtype)
        codes, grid, _ = compensate(
            (w / unit)[:, order],
            given.factored.upper,
            Grid(leaf.lut, scales, offsets),
            jnp.arange(w.shape[1], dtype=jnp.int32) // leaf.group_size,
            block=self.block,
            uniform=leaf.uniform,
            rescale=Rescale(inner.scale_groups, given.energy[order], leaf.group_size),
        )
        stored = jax.tree.map(lambda each: scaling.in_units(each, unit), (grid.scales, grid.offsets))
        return _leaf_of(codes, Fit(leaf.lut, *stored), leaf)

    def _refitted(self, w, hessian, fit: Fit, codes, leaf: QuantizedTensor) -> tuple[Fit, jax.Array]:
        if weights.is_operator(fit.scales) or weights.is_operator(fit.offsets):
            raise ValueError(
                f"got refits={self.refits} with {self.inner.name}, whose scales or offsets are coded themselves, and "
                "refits move plain ones; pass refits=0"
            )
        # A table of one row is shared.
        free = slice(None) if leaf.lut.shape[0] > 1 else slice(0)
        # In units, so that what the stored dtypes can't hold at the weights' size is marked as lost.
        unit = scaling.unit(w, fit.scales.dtype)
        even = jax.tree.map(lambda a: (a.astype(jnp.float32) / unit).astype(a.dtype), (fit.scales, fit.offsets))
        made, codes = improve(
            *(w / unit, hessian, Fit(fit.lut, *even), codes, leaf.group_size),
            rounds=self.refits,
            sweeps=_SWEEPS,
            entries=free,
            uniform=leaf.uniform,
        )
        scales, offsets = jax.tree.map(lambda a: scaling.in_units(a, unit), (made.scales, made.offsets))
        return Fit(made.lut, scales, offsets), codes


def one_leaf(operator: Any, name: str, inner: Method) -> QuantizedTensor:
    """The operator of an inner method, for the method `name` that chooses its codes.

    Raises:
      ValueError: it is something else than one coded matrix.
    """
    if not isinstance(operator, QuantizedTensor):
        raise ValueError(
            f"got inner={inner.name}, which gives a {type(operator).__name__}, and {name} chooses the codes of "
            "one QuantizedTensor; pass a method that gives one"
        )
    return operator


def _plain(stored: Any) -> jax.Array:
    """Scales or offsets as an array, where they are an operator themselves."""
    return weights.dequantize(stored) if weights.is_operator(stored) else stored


def _leaf_of(codes: jax.Array, fit: Fit, like: QuantizedTensor) -> QuantizedTensor:
    """The leaf of the same format with other codes, tables, scales and offsets."""
    return weights.from_codes(codes, *fit, bits=like.bits, group_size=like.group_size, uniform=like.uniform)
