"""The columns of a matrix in sequence, with the Hessian that their errors count by: what GPTQ and SpQR start from."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from any4_jax import scaling
from any4_jax.compensation import Factor, damped, factor, solve
from any4_jax.statistics import Drift, Gathered, Hessian


class Columns(NamedTuple):
    """What is known of the columns of a matrix.

    Attributes:
      target: float32 [N, K], what is quantized in place of the weights.
      hessian: float32 [K, K], damped.
      order: int32 [K], the sequence of the columns.
      energy: E[x^2] of each input, float32 [K].
      factored: the Hessian's factor for the sequence.
      tokens: int32 [], how many there were.
    """

    target: jax.Array
    hessian: jax.Array
    order: jax.Array
    energy: jax.Array
    factored: Factor
    tokens: jax.Array

    @property
    def back(self) -> jax.Array:
        """int32 [K]: where each column of the matrix is in the sequence."""
        return jnp.argsort(self.order)

    def fault(self, damping: float | None) -> dict[str, tuple[jax.Array, ...]]:
        """That the Hessian is of no use, for `Result.faults`."""
        k = self.order.shape[0]
        text = (
            f"the Hessian of {{}} tokens with damping={damping} is not positive definite, K={k} inputs need at least "
            f"{k} tokens that differ, or damping; pass more data or a larger damping"
        )
        return {text: (~self.factored.positive, self.tokens)}

    def usable(self, stored: jax.Array) -> jax.Array:
        """The stored array; NaN where it is floating and the Hessian isn't positive definite. Codes under such a one
        are noise, and a method around this one shall see it too."""
        good = self.factored.positive
        return jnp.where(good, stored, jnp.nan) if jnp.issubdtype(stored.dtype, jnp.inexact) else stored


def columns(w: jax.Array, gathered: Gathered, *, act_order: bool, damping: float | None, asymmetric: float) -> Columns:
    """The columns of w float32 [N, K]; for the fields see `GPTQ`.

    Args:
      w: float32 [N, K].
      gathered: with the `Hessian` of the input, and the `Drift` unless `asymmetric` is 0.
      act_order, damping, asymmetric: as in `GPTQ`.
    """
    seen, k = gathered[Hessian()], w.shape[1]
    hessian = damped(seen.mean, _share(damping, seen.count, k))
    straight = jnp.arange(k, dtype=jnp.int32)
    energy = jnp.diagonal(seen.mean)
    order = jnp.argsort(energy, descending=True).astype(jnp.int32) if act_order else straight
    factored = factor(hessian, order)
    made = Columns(w, hessian, order, energy, factored, seen.count)
    if not asymmetric:
        return made
    unit = scaling.unit(w, jnp.float32)
    lacking = jnp.matmul(w / unit, gathered[Drift()].mean, precision=jax.lax.Precision.HIGHEST)
    return made._replace(target=w + asymmetric * unit * solve(factored, lacking[:, order])[:, made.back])


def _share(damping: float | None, tokens: jax.Array, k: int) -> jax.Array | float:
    """The damping, with None replaced by what it means for the number of tokens, int32 []."""
    if damping is not None:
        return damping
    ratio = k / jnp.maximum(tokens, 1).astype(jnp.float32)
    return jnp.square(1 + jnp.sqrt(ratio)) - 1
