"""Applying a method to one matrix or one site, with checks of its inputs and its results."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.methods.base import AnyMethod, Method, Result, SiteMethod, SiteResult, SiteWeights, scope_of
from any4_jax.partition import partition
from any4_jax.statistics import Gathered
from any4_jax.weights import is_operator

_FAULTS = {
    "weights": "the weights hold NaN or infinite values, need finite ones; fix the checkpoint or leave the layer out",
    "statistics": "the statistics hold NaN or infinite values, need finite ones; gather them from other text",
    "factor": "the method's input_scale has factors that are not positive and finite, need such; correct the method",
    "stored": "its scales or tables overflow the dtype they are stored in; pass scale_dtype='float32' and "
    "table_dtype='float32'",
}
"""What is wrong where a check fails; the first of them is the cause of the others."""


@functools.partial(jax.jit, static_argnames=("method", "transposed"))
def _apply(w, gathered, method: Method, transposed: bool):
    w = (w.T if transposed else w).astype(jnp.float32)
    result = method.apply(w, gathered)
    _check_type(method, result, Result)
    return result, _checks(w, gathered, result.operator)


@functools.partial(jax.jit, static_argnames="method")
def _apply_site(site, gathered, method: SiteMethod):
    result = method.apply(site, gathered)
    _check_type(method, result, SiteResult)
    for one in result.results.values():
        _check_type(method, one, Result)
    made = [one.operator for one in result.results.values()]
    scale = jnp.ones(1) if result.input_scale is None else result.input_scale
    usable = jnp.isfinite(scale).all() & (scale > 0).all()
    return result, {"factor": usable, **_checks(site.weights, gathered, made)}


def _checks(weights: Any, gathered: Any, made: Any) -> dict[str, jax.Array]:
    """Whether all is well, by the keys of _FAULTS."""
    looked_at = {"weights": weights, "statistics": gathered, "stored": partition(made)[0]}
    return {name: _all_finite(tree) for name, tree in looked_at.items()}


def _check_type(method: AnyMethod, result: Any, need: type) -> None:
    if not isinstance(result, need):
        raise TypeError(
            f"{method.name}.apply returned a {type(result).__name__}, need a {need.__name__}; return one, as "
            "any4_jax/methods/base.py has it"
        )


def _all_finite(tree) -> jax.Array:
    floats = (leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact))
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in floats] or [jnp.array(True)]).all()


def apply_method(
    w: Any, method: Method, gathered: Gathered | None = None, *, transposed: bool = False, path: str = "the weight"
) -> Result:
    """`quantize`, but returns the method's notes too."""
    if is_operator(w):
        raise TypeError(f"{path} is a {type(w).__name__} already, need an array; dequantize it first")
    if scope_of(method) != "matrix":
        raise ValueError(
            f"{path}: {method.name} quantizes the matrices of a {scope_of(method)} together, not one; pass it to "
            "quantize_model"
        )
    dtype = getattr(w, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{path} has dtype {dtype}, need a floating dtype; convert it first")
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"{path} has shape {tuple(w.shape)}, need [N, K] with N, K >= 1; reshape it or leave it out")
    _check_gathered(w.shape[0] if transposed else w.shape[1], method, gathered, path)
    result, finite = _apply(w, gathered, method, transposed)
    _refuse_faults(finite, path)
    return result


def quantize(w: Any, method: Method, stats: Gathered | None = None, *, transposed: bool = False, path="the weight"):
    """Quantizes one matrix.

    Args:
      w: [N, K] weights (or [K, N] with `transposed`, as Flax keeps kernels), any float dtype.
      method: a method of one matrix, see any4_jax.methods.
      stats: statistics of the linear's input [..., K], or None.
      path: the name of this weight in errors.

    Returns:
      An operator of shape [N, K]; a QuantizedTensor for methods that store one table-coded matrix.

    Raises:
      ValueError: the weight is empty, not two-dimensional or not finite; the statistics have another K, are not finite,
        or lack one that the method needs; scales overflow their dtype; the method's fields contradict each other, or
        need statistics and there are none; the method quantizes several matrices together.
      TypeError: the weight is not floating, or is quantized already.
    """
    return apply_method(w, method, stats, transposed=transposed, path=path).operator


def apply_site(site: SiteWeights, method: SiteMethod, gathered: Gathered | None, path: str) -> SiteResult:
    """Quantizes the matrices of a site; `path` is its name in errors.

    Raises:
      ValueError: as in `quantize`.
    """
    _check_gathered(next(iter(site.weights.values())).shape[1], method, gathered, path)
    result, finite = _apply_site(site, gathered, method)
    _refuse_faults(finite, path)
    if set(result.results) != set(site.weights):
        raise ValueError(
            f"{path}: {method.name} gave results for {sorted(result.results)}, need one for each of "
            f"{sorted(site.weights)}; correct the method"
        )
    return result


def _check_gathered(k: int, method: AnyMethod, gathered: Gathered | None, path: str) -> None:
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


def _refuse_faults(finite: dict[str, Any], path: str) -> None:
    for name, fault in _FAULTS.items():
        ok = finite.get(name, True)
        if not isinstance(ok, jax.core.Tracer) and not np.asarray(ok):
            raise ValueError(f"{path}: {fault}")
