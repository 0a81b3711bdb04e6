"""Whether contents, those of a checkpoint for instance, fit a model: all in their places, of the shapes needed."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.core import meta

from any4_jax.matmul import is_quantized

_NAMED = 3


class Misfit(ValueError):
    """Contents that don't fit a model.

    Attributes:
      faults: what is wrong, a phrase that names the first entries.
    """

    def __init__(self, faults: str) -> None:
        super().__init__(f"the contents don't fit the model: {faults}; pass the model they are from")
        self.faults = faults


def check(
    wanted: Mapping[str, Any],
    given: Mapping[str, Any],
    turned: Callable[[str], bool | None],
    *,
    declared: bool = True,
) -> None:
    """Raises Misfit unless `given` can take the place of `wanted`.

    An operator may be in the place of a float kernel, of another operator, and the other way round, where both stand
    for a matrix of the same shape; how it is quantized is its own affair. Arrays need the same shape and dtype,
    since a cast would change what was stored.

    Args:
      wanted: leaves of a model by dotted path: arrays, ShapeDtypeStructs or operators.
      given: the leaves to put there.
      turned: of a path, whether a float matrix there is [*L, K, N] and not [*L, N, K]; None where no operator can be.
      declared: whether the dtype of a ShapeDtypeStruct among `wanted` is meant; those of arrays always are.
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
    """What of `given` is not as `wanted` needs it."""
    wanted, given = meta.unbox(wanted), meta.unbox(given)
    operators = is_quantized(wanted), is_quantized(given)
    need, got = tuple(np.shape(wanted)), tuple(np.shape(given))
    if any(operators) and turned is None:
        return f"{path} is quantized and no kernel of a dense layer"
    if operators[0] != operators[1] and turned:
        need = (*need[:-2], *need[:-3:-1])
    if got != need:
        return f"{path} is {list(got)}, need {list(need)}"
    if not any(operators) and (declared or not isinstance(wanted, jax.ShapeDtypeStruct)):
        dtypes = [getattr(leaf, "dtype", type(leaf).__name__) for leaf in (given, wanted)]
        if dtypes[0] != dtypes[1]:
            return f"{path} is {dtypes[0]}, need {dtypes[1]}"
    return None


def _first(items: list[str]) -> str:
    rest = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
