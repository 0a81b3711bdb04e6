"""What a quantization method is, and the function that applies one to a matrix."""

import functools
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.statistics import Statistics
from any4_jax.weights import is_operator


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass that turns a matrix and its input's statistics into an operator.

    The dataclass is at once the configuration, the command line's flags and the manifest's entry: its fields are
    plain numbers, strings, booleans or None. `apply` is pure and traced under jit with the method static.
    """

    name: ClassVar[str]
    sequential: bool

    def apply(self, w: jax.Array, stats: Statistics | None) -> Any:
        """The operator for w float32 [N, K]."""
        ...

    def check(self, stats_given: bool) -> None:
        """Raises ValueError where the fields contradict each other or need statistics that are not given."""
        ...

    def notes(self, stats_given: bool) -> dict[str, str]:
        """What the manifest must record besides the fields: choices that were made from what was given."""
        ...


@functools.partial(jax.jit, static_argnames=("method", "transposed"))
def _apply(w, stats, method: Method, transposed: bool):
    w = (w.T if transposed else w).astype(jnp.float32)
    return method.apply(w, stats), jnp.isfinite(w).all()


def quantize(w, method: Method, stats: Statistics | None = None, *, transposed: bool = False, path: str = "the weight"):
    """Quantizes one matrix.

    Args:
      w: [N, K] weights (or [K, N] with `transposed`, as Flax keeps kernels), any float dtype.
      method: see any4_jax.methods.
      stats: statistics of the layer's input, of K features.
      path: what errors call this weight.

    Returns:
      An operator of shape [N, K]; a QuantizedTensor for methods that store one table-coded matrix.

    Raises:
      ValueError: a weight that is empty, not two-dimensional or not finite; statistics of another K; fields of the
        method that contradict each other, or that need statistics where none are given.
      TypeError: a weight that is not floating.
    """
    if is_operator(w):
        raise TypeError(f"{path} is a {type(w).__name__} already, need an array; dequantize it first")
    dtype = getattr(w, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{path} has dtype {dtype}, need a floating dtype; convert it first")
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"{path} has shape {tuple(w.shape)}, need [N, K] with N, K >= 1; reshape it or leave it out")
    k = w.shape[0] if transposed else w.shape[1]
    if stats is not None and stats.absmax.shape != (k,):
        raise ValueError(
            f"{path} has K={k} inputs but its statistics have {stats.absmax.shape[0]}; "
            "gather them at this layer's input"
        )
    method.check(stats is not None)
    operator, finite = _apply(w, stats, method, transposed)
    if not isinstance(finite, jax.core.Tracer) and not np.asarray(finite):
        raise ValueError(
            f"{path} holds NaN or infinite values, need finite weights; mend the checkpoint or leave it out"
        )
    return operator
