"""What a kernel has to say of itself to stand in the table of `any4_jax.matmul`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from any4_jax.weights import QuantizedTensor


@dataclasses.dataclass(frozen=True)
class Backend:
    """A kernel family.

    Attributes:
      name: what `matmul(backend=...)` calls it.
      supports: (x, w, platform) -> None, or the reason in words why it can't. It looks at shapes, dtypes and the
        platform only, so it works while tracing.
      run: (x [M, K], arrays from `prepare`) -> y [M, N] in x's dtype.
      prepare: QuantizedTensor -> the arrays that `run` reads.
      unprepare: the exact inverse of `prepare`.
      run_together: (x [M, K], arrays of several weights that agree in bits, group size and K) -> y [M, N] of each, in
        one call that is faster than several; None where there is no such call.
      takes_layers: `prepare`, `run` and `run_together` take a Layer too, and read the matrix where it lies in its
        stack. Others get a copy of it.
      detail: (x, w) -> which of its kernels such a product takes and why, in words, where `supports` has no objection;
        None for a family of one kernel.
    """

    name: str
    supports: Callable[[Any, QuantizedTensor, str], str | None]
    run: Callable[[jax.Array, Any], jax.Array]
    prepare: Callable[[QuantizedTensor], Any]
    unprepare: Callable[[Any], QuantizedTensor]
    run_together: Callable[[jax.Array, Sequence[Any]], tuple[jax.Array, ...]] | None = None
    takes_layers: bool = False
    detail: Callable[[Any, QuantizedTensor], str] | None = None
