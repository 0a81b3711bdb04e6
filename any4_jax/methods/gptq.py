"""GPTQ (arXiv 2210.17323): codes that compensate each other's errors, on the tables and scales of any other method."""

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from any4_jax import scaling, weights
from any4_jax.methods.any4 import Any4
from any4_jax.methods.base import Method, Result
from any4_jax.methods.compensation import Grid, Rescale, compensate, factor
from any4_jax.statistics import Gathered, Hessian, Statistic


@runtime_checkable
class ScalesGroups(Protocol):
    """A method that can scale groups of weights apart from the rest of their rows, for given tables."""

    def scale_groups(self, w: jax.Array, importance: jax.Array, lut: jax.Array) -> scaling.GroupScales:
        """Scales and offsets [N, ceil(K/G)], in stored dtypes, of weights w float32 [N, K] for tables lut
        [N or 1, 2**bits], where the error of each input counts by importance float32 [K]."""
        ...


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """Error compensation: the inner method gives tables, scales and offsets, and GPTQ the codes.

    The columns of a matrix are quantized in sequence. Each takes the code that is nearest once the errors of the
    columns before it are compensated, as far as inputs that occur together allow (compensation.py). What counts is the
    error of the layer's output, tr((W - Q) H (W - Q)^T) with H = E[x x^T]. The weights of inputs that were always zero
    are rounded to nearest.

    Attributes:
      inner: what gives tables and scales: any method whose result is one table-coded matrix.
      act_order: take the columns by E[x^2], the largest first. Where groups are static, this costs nothing later; else
        groups are of columns in that sequence, and a `PermuteInput` puts the inputs into it.
      static_groups: scale all groups before any weight is changed, by the inner method. Else a group's scale and offset
        are found when its first column comes, from the weights as compensated so far.
      damping: the share of the mean E[x^2] that is added to the diagonal of H.
      block: columns between two updates from all columns before. It changes nothing beyond rounding.
      sequential: gather statistics from the model as quantized so far.
    """

    name: ClassVar[str] = "gptq"
    inner: Method = Any4()
    act_order: bool = True
    static_groups: bool = True
    damping: float = 0.01
    block: int = 128
    sequential: bool = True

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return (Hessian(), *self.inner.needs)

    def check(self, gathered: bool) -> None:
        if not gathered:
            raise ValueError("got no statistics, gptq needs the Hessian of each layer's input; pass data")
        if not self.damping >= 0:
            raise ValueError(f"got damping={self.damping}, need a share of at least 0; pass 0.01 or so")
        if self.block < 1:
            raise ValueError(f"got block={self.block}, need at least 1 column; pass 128 or so")
        if not self.static_groups and not isinstance(self.inner, ScalesGroups):
            raise ValueError(
                f"got static_groups=False with {self.inner.name}, which has no scale_groups to scale one group apart; "
                "pass static_groups=True"
            )
        self.inner.check(gathered)

    def apply(self, w: jax.Array, gathered: Gathered | None) -> Result:
        assert gathered is not None  # `check` refuses to go on without
        given = self.inner.apply(w, gathered)
        leaf = self._leaf(given.operator)
        seen, k = gathered[Hessian()], w.shape[1]
        hessian = seen.mean
        straight = jnp.arange(k, dtype=jnp.int32)
        energy = jnp.diagonal(hessian)
        order = jnp.argsort(energy, descending=True).astype(jnp.int32) if self.act_order else straight
        upper, positive = factor(hessian, order, self.damping)
        # Groups of the sequence, rather than of neighbours in the matrix.
        moving = not self.static_groups and leaf.group_size < k
        inner: Any = self.inner
        rescale = Rescale(inner.scale_groups, energy[order], leaf.group_size) if moving else None
        codes, grid = compensate(
            w[:, order],
            upper,
            Grid(leaf.lut, _plain(leaf.scales), None if leaf.offsets is None else _plain(leaf.offsets)),
            (straight if moving else order) // leaf.group_size,
            block=self.block,
            uniform=leaf.uniform,
            rescale=rescale,
        )
        # Codes under a Hessian that isn't positive definite are noise: a method around this one shall see it too.
        operator: Any = weights.from_codes(
            codes if moving else codes[:, jnp.argsort(order)],
            jnp.where(positive, leaf.lut, jnp.nan).astype(leaf.lut.dtype),
            grid.scales if moving else leaf.scales,
            grid.offsets if moving else leaf.offsets,
            bits=leaf.bits,
            group_size=leaf.group_size,
            uniform=leaf.uniform,
        )
        if moving and self.act_order:
            operator = weights.PermuteInput(operator, order)
        fault = (
            f"the Hessian of {{}} tokens with damping={self.damping} is not positive definite, K={k} inputs need at "
            f"least {k} tokens that differ, or damping; pass more data or a larger damping"
        )
        return Result(operator, dict(given.notes), {fault: (~positive, seen.count)})

    def _leaf(self, operator: Any) -> weights.QuantizedTensor:
        if not isinstance(operator, weights.QuantizedTensor):
            raise ValueError(
                f"got inner={self.inner.name}, which gives a {type(operator).__name__}, and gptq chooses the codes of "
                "one QuantizedTensor; pass a method that gives one"
            )
        return operator


def _plain(stored: Any) -> jax.Array:
    """Scales or offsets as an array, where they are an operator themselves."""
    return weights.dequantize(stored) if weights.is_operator(stored) else stored
