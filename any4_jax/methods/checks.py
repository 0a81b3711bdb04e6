"""What methods are given and give, checked."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.methods.base import AnyMethod, Result
from any4_jax.partition import partition
from any4_jax.statistics import Gathered

_FAULTS = {
    "weights": "the weights hold NaN or infinite values, need finite ones; fix the checkpoint or leave the layer out",
    "statistics": "the statistics hold NaN or infinite values, need finite ones; gather them from other text",
    "factor": "the method's input_scale has factors that are not positive and finite, need such; correct the method",
    "stored": "its scales or tables overflow the dtype they are stored in; pass scale_dtype='float32' and "
    "table_dtype='float32'",
}
"""What is wrong where a check fails; the first of them is the cause of the others."""


def checks(weights: Any, gathered: Any, made: Any) -> dict[str, jax.Array]:
    """Whether all is well, by the keys of _FAULTS."""
    looked_at = {"weights": weights, "statistics": gathered, "stored": partition(made)[0]}
    return {name: all_finite(tree) for name, tree in looked_at.items()}


def check_type(method: AnyMethod, result: Any, need: type) -> None:
    """Raises TypeError unless a method returned what its scope needs."""
    if not isinstance(result, need):
        raise TypeError(
            f"{method.name}.apply returned a {type(result).__name__}, need a {need.__name__}; return one, as "
            "any4_jax/methods/base.py has it"
        )


def check_result(method: AnyMethod, result: Any, shape: tuple[int, ...]) -> None:
    """Refuses what is no `Result` with an operator of the shape [N, K] of its matrix, given as `shape`.

    Raises:
      TypeError: it is no Result.
      ValueError: the operator has another shape.
    """
    check_type(method, result, Result)
    if tuple(result.operator.shape) != tuple(shape):
        raise ValueError(
            f"{method.name}.apply gave an operator of shape {tuple(result.operator.shape)} for a matrix [N, K] = "
            f"{tuple(shape)}, need the same; correct the method"
        )


def all_finite(tree: Any) -> jax.Array:
    """Whether no floating-point leaf holds NaN or infinity, bool []."""
    floats = (leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact))
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in floats] or [jnp.array(True)]).all()


def check_gathered(k: int, method: AnyMethod, gathered: Gathered | None, path: str) -> None:
    """Raises ValueError unless the statistics are of K = `k` inputs and are what the method needs."""
    if gathered is not None and gathered.k != k:
        raise ValueError(
            f"{path} has K={k} inputs but its statistics have {gathered.k}; gather them at this linear's input"
        )
    method.check(gathered is not None)
    missing = [] if gathered is None else [statistic for statistic in method.needs if statistic not in gathered]
    if missing:
        raise ValueError(
            f"{path} has statistics without {missing[0]!r}, which {method.name} with these fields needs; gather them "
            "with calibrate(model, data, method)"
        )


def refuse_faults(finite: Mapping[str, Any], path: str, results: Iterable[Result]) -> None:
    """Raises ValueError for the first of _FAULTS that `checks` found, or of what the results themselves tell; traced
    checks are passed over."""
    told: list[Any] = [(is_so, text, numbers) for one in results for text, (is_so, *numbers) in one.faults.items()]
    seen: list[Any] = [(~jnp.asarray(finite[name]), fault, ()) for name, fault in _FAULTS.items() if name in finite]
    # What is stored is at fault because of what the method tells of it.
    for is_so, fault, numbers in (*seen[:-1], *told, *seen[-1:]):
        if not isinstance(is_so, jax.core.Tracer) and np.asarray(is_so):
            raise ValueError(f"{path}: {fault.format(*map(np.asarray, numbers))}")
