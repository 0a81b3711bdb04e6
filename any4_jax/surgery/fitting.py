"""Checks that contents, such as those of a checkpoint, fit a model: nothing missing, nothing extra, equal shapes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.core import meta

from any4_jax.weights import Contraction, is_operator

_NAMED = 3


class Misfit(ValueError):
    """Contents that don't fit a model.

    Attributes:
      faults: what is wrong; a phrase that names the first entries.
    """

    def __init__(self, faults: str) -> None:
        super().__init__(f"the contents don't fit the model: {faults}; pass the model that they came from")
        self.faults = faults


def check(
    wanted: Mapping[str, Any],
    given: Mapping[str, Any],
    turned: Callable[[str], bool | None],
    *,
    declared: bool = True,
) -> None:
    """Raises Misfit unless `given` can replace `wanted`.

    An operator can replace a float kernel or another operator, and a float kernel can replace an operator, if both
    stand for a matrix of the same shape; how a matrix is quantized doesn't matter. Arrays need the same shape and
    dtype, because a cast would change what was stored.

    Args:
      wanted: leaves of a model by dotted path: arrays, ShapeDtypeStructs or operators.
      given: the leaves that replace them.
      turned: path -> True if a float matrix there is [*L, K, N], False if it is [*L, N, K], None if no operator can be
        there.
      declared: whether to compare the dtypes of ShapeDtypeStructs among `wanted` too; those of arrays always are.
    """
    absent = [path for path in wanted if path not in given]
    unknown = [path for path in given if path not in wanted]
    common = [path for path in wanted if path in given]
    misfits = [_misfit(path, wanted[path], given[path], turned(path), declared) for path in common]
    faults = [
        f"{what}{_first(found)}"
        for what, found in (
            ("they lack ", absent),
            ("the model has no ", unknown),
            ("", [misfit for misfit in misfits if misfit]),
        )
        if found
    ]
    if faults:
        raise Misfit("; ".join(faults))


def _misfit(path: str, wanted: Any, given: Any, turned: bool | None, declared: bool) -> str | None:
    """How `given` differs from what `wanted` needs; None if it fits."""
    wanted, given = meta.unbox(wanted), meta.unbox(given)
    operators = is_operator(wanted), is_operator(given)
    need, got = _shape(wanted), _shape(given)
    kernels = isinstance(wanted, Contraction) or isinstance(given, Contraction)
    if any(operators) and turned is None and not kernels:
        return f"{path} is quantized and is not the kernel of a dense layer"
    if operators[0] != operators[1] and turned and not kernels:
        need = (*need[:-2], *need[:-3:-1])
    if got != need:
        return f"{path} is {list(got)}, need {list(need)}"
    if not any(operators) and (declared or not isinstance(wanted, jax.ShapeDtypeStruct)):
        dtypes = [getattr(leaf, "dtype", type(leaf).__name__) for leaf in (given, wanted)]
        if dtypes[0] != dtypes[1]:
            return f"{path} is {dtypes[0]}, need {dtypes[1]}"
    return None


def _shape(leaf: Any) -> tuple[int, ...]:
    """The shape of an array, of an operator as a matrix, or of the kernel of any rank that an operator stands for."""
    return tuple(leaf.kernel_shape if isinstance(leaf, Contraction) else np.shape(leaf))


def _first(items: list[str]) -> str:
    rest = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
