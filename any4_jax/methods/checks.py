"""What methods are given and give, checked."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax import scaling
from any4_jax.methods.base import AnyMethod, Result
from any4_jax.methods.fields import check_fields
from any4_jax.statistics import Gathered
from any4_jax.weights import is_operator, places

_FAULTS = {
    "weights": "the weights hold NaN or infinite values, need finite ones; fix the checkpoint or leave the layer out",
    "statistics": "the statistics hold NaN or infinite values, need finite ones; activations that overflow float16 do "
    "that, so load the model with dtype='bfloat16' or 'float32' and gather them again",
    "signs": "the statistics hold negative counts, magnitudes or squares, which no activations have; gather them with "
    "calibrate(model, data, method)",
    "factor": "the method's input_scale has factors that are not positive and finite, need such; correct the method",
    "stored": "",
}
"""What is wrong where a check fails; the first of them is the cause of the others. `_unheld` tells the last."""


def checks(weights: Any, gathered: Any, made: Any) -> dict[str, jax.Array]:
    """Whether all is well, by the keys of _FAULTS."""
    looked_at = {"weights": weights, "statistics": gathered}
    found = {name: all_finite(tree) for name, tree in looked_at.items()}
    signs = jnp.array(True) if gathered is None else gathered.possible()
    return {**found, "signs": signs, "stored": ~jnp.stack([*_faulty(made).values(), jnp.array(False)]).any()}


def _faulty(made: Any) -> dict[str, jax.Array]:
    """Whether the array at each place of the operators made holds what its dtype can't, bool []."""
    operators = jax.tree.leaves(made, is_leaf=is_operator)
    found = {}
    for index, operator in enumerate(operators):
        for place, array in places(operator):
            if jnp.issubdtype(array.dtype, jnp.inexact):
                found[f"{index}/{place.name}"] = ~jnp.isfinite(array).all()
            elif place.trained == "tables":
                found[f"{index}/{place.name}"] = scaling.is_lost(array).any()
    return found


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
    check_fields(method)
    method.check(gathered is not None)
    missing = [] if gathered is None else [statistic for statistic in method.needs if statistic not in gathered]
    if missing:
        source = getattr(missing[0], "source", "gather them with calibrate(model, data, method)")
        raise ValueError(
            f"{path} has statistics without {missing[0]!r}, which {method.name} with these fields needs; {source}"
        )


def refuse_faults(finite: Mapping[str, Any], path: str, results: Iterable[Result] = ()) -> None:
    """Raises ValueError for the first of _FAULTS that `checks` found in what a method gave, or that the results tell
    themselves; traced checks are passed over."""
    results = list(results)
    told: list[Any] = [(is_so, text, numbers) for one in results for text, (is_so, *numbers) in one.faults.items()]
    seen: list[Any] = [(~jnp.asarray(finite[name]), fault, ()) for name, fault in _FAULTS.items() if name in finite]
    # What is stored is at fault because of what the method tells of it.
    for is_so, fault, numbers in (*seen[:-1], *told, *seen[-1:]):
        if not isinstance(is_so, jax.core.Tracer) and np.asarray(is_so):
            words = fault.format(*map(np.asarray, numbers)) or _unheld([one.operator for one in results])
            raise ValueError(f"{path}: {words}")


_WIDER = {
    ("float16", "small"): "pass {field}='bfloat16' or {field}='float32'",
    ("float16", "large"): "pass {field}='bfloat16' or {field}='float32'",
    ("bfloat16", "large"): "pass {field}='float32', or scale the weights by a power of two",
}
"""What to do about values that are too small or too large for a dtype, where another dtype holds them."""


def _unheld(made: Any) -> str:
    """What the stored dtype of the first array at fault can't hold, and what to do."""
    arrays = {
        f"{index}/{place.name}": array
        for index, operator in enumerate(jax.tree.leaves(made, is_leaf=is_operator))
        for place, array in places(operator)
    }
    # Tables are learned for their scales, so that a fault of the scales is one of the table too.
    where = min((name for name, faulty in _faulty(made).items() if faulty), key=lambda name: name.endswith("lut"))
    array, name = arrays[where], where.rpartition("/")[2]
    what, field = ("table", "table_dtype") if name == "lut" else (name or "values", "scale_dtype")
    too = "small" if bool(scaling.is_lost(array).any()) else "large"
    dtype = "e8m0" if array.dtype == jnp.uint8 else str(array.dtype)
    advice = _WIDER.get((dtype, too), "scale the weights by a power of two").format(field=field)
    return f"its {what} would be too {too} for {dtype}; {advice}"
