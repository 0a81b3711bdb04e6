"""What a quantization method is, and the function that applies one to a matrix."""

import functools
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.partition import partition
from any4_jax.statistics import Statistics
from any4_jax.weights import is_operator


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass that turns a matrix and its input's statistics into an operator.

    The dataclass is at once the configuration, the command line's flags and the manifest's entry: its fields are
    plain numbers, strings, booleans or None. `apply` is pure and traced under jit with the method static.
    """

    name: ClassVar[str]

    @property
    def sequential(self) -> bool:
        """Whether `calibrate` takes statistics from the model as quantized so far, where it is not told."""
        ...

    @property
    def samples(self) -> int:
        """Tokens that statistics must hold a sample of, where there are any statistics; 0 for methods of sums alone."""
        ...

    def apply(self, w: jax.Array, stats: Statistics | None) -> Any:
        """The operator for w float32 [N, K]."""
        ...

    def check(self, stats_given: bool) -> None:
        """Raises ValueError where the fields contradict each other or need statistics that are not given."""
        ...

    def notes(self, stats_given: bool) -> dict[str, str]:
        """What the manifest must record besides the fields: choices that were made from what was given."""
        ...


_FAULTS = (
    "the weights hold NaN or infinite values, need finite ones; mend the checkpoint or leave the layer out",
    "the statistics hold NaN or infinite values, need finite ones; gather them from other text",
    "its scales or tables overflow the dtype they are stored in; pass scale_dtype='float32' and table_dtype='float32'",
)


@functools.partial(jax.jit, static_argnames=("method", "transposed"))
def _apply(w, stats, method: Method, transposed: bool):
    w = (w.T if transposed else w).astype(jnp.float32)
    operator = method.apply(w, stats)
    return operator, [_all_finite(w), _all_finite(stats), _all_finite(partition(operator)[0])]


def _all_finite(tree) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)] or [jnp.array(True)]).all()


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
      ValueError: a weight that is empty, not two-dimensional or not finite; statistics of another K or not finite;
        scales that overflow their dtype; fields of the method that contradict each other, or that need statistics
        where none are given.
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
    if stats is not None and method.samples and not stats.draws.shape[0]:
        raise ValueError(
            f"{path} has statistics without a sample of its inputs, which {method.name} with these fields needs; "
            "gather them with calibrate(model, data, method)"
        )
    operator, finite = _apply(w, stats, method, transposed)
    if not isinstance(finite[0], jax.core.Tracer):
        for ok, fault in zip(finite, _FAULTS, strict=True):
            if not np.asarray(ok):
                raise ValueError(f"{path}: {fault}")
    return operator
