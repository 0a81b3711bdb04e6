"""Applying a method to one matrix, one site or one block, with checks of its inputs and its results."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax.methods.base import (
    Block,
    BlockMethod,
    BlockResult,
    Method,
    Result,
    SiteMethod,
    SiteResult,
    SiteWeights,
    scope_of,
)
from any4_jax.methods.checks import all_finite, check_gathered, check_result, check_type, checks, refuse_faults
from any4_jax.partition import partition
from any4_jax.statistics import Gathered
from any4_jax.weights import is_operator, trimmed


@functools.partial(jax.jit, static_argnames=("method", "transposed"))
def _apply(w, gathered, method: Method, transposed: bool):
    w = (w.T if transposed else w).astype(jnp.float32)
    with jax.numpy_rank_promotion("allow"):  # the caller's setting is about the caller's code, not the methods'
        result = method.apply(w, gathered)
    check_result(method, result, w.shape)
    return result, checks(w, gathered, result.operator)


@functools.partial(jax.jit, static_argnames="method")
def _apply_site(site, gathered, method: SiteMethod):
    with jax.numpy_rank_promotion("allow"):
        result = method.apply(site, gathered)
    check_type(method, result, SiteResult)
    if set(result.results) != set(site.weights):
        raise ValueError(
            f"{method.name}.apply gave results for {sorted(result.results)}, need one for each of "
            f"{sorted(site.weights)}; correct the method"
        )
    for path, w in site.weights.items():
        check_result(method, result.results[path], w.shape)
    made = [one.operator for one in result.results.values()]
    scale = jnp.ones(1) if result.input_scale is None else result.input_scale
    usable = jnp.isfinite(scale).all() & (scale > 0).all()
    return result, {"factor": usable, **checks(site.weights, gathered, made)}


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
    check_gathered(w.shape[0] if transposed else w.shape[1], method, gathered, path)
    result, finite = _apply(w, gathered, method, transposed)
    refuse_faults(finite, path, [result])
    return _finished(result)


def _finished(result: Result) -> Result:
    """A result without faults; how many entries its sparse matrices have is only known out of jit."""
    return dataclasses.replace(result, operator=trimmed(result.operator), faults={})


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
        have signs that no activations give, or lack one that the method needs; scales or tables are too large or too
        small for their dtype; a field of the method is not of its type; the fields contradict each other, or need
        statistics and there are none; the method quantizes several matrices together.
      TypeError: the weight is not floating, or is quantized already.
    """
    return apply_method(w, method, stats, transposed=transposed, path=path).operator


def apply_site(site: SiteWeights, method: SiteMethod, gathered: Gathered | None, path: str) -> SiteResult:
    """Quantizes the matrices of a site; `path` is its name in errors.

    Raises:
      ValueError: as in `quantize`.
    """
    check_gathered(next(iter(site.weights.values())).shape[1], method, gathered, path)
    result, finite = _apply_site(site, gathered, method)
    refuse_faults(finite, path, result.results.values())
    return dataclasses.replace(result, results={name: _finished(one) for name, one in result.results.items()})


def apply_block(block: Block, method: BlockMethod, path: str) -> BlockResult:
    """Quantizes a block; `path` is its name in errors.

    Raises:
      TypeError: the method returns no BlockResult.
      ValueError: the new contents have other names or shapes, or NaN or infinite values that were finite.
    """
    with jax.numpy_rank_promotion("allow"):
        result = method.apply(block)
    check_type(method, result, BlockResult)
    if set(result.contents) != set(block.contents):
        names = sorted(set(result.contents) ^ set(block.contents))
        raise ValueError(f"{path}: {method.name} lost or added the contents {names}; correct the method")
    changed = {name: new for name, new in result.contents.items() if new is not block.contents[name]}
    for name, new in changed.items():
        old = block.contents[name]
        turned = is_operator(new) and not is_operator(old)
        need = (*old.shape[:-2], *old.shape[:-3:-1]) if turned else old.shape
        if tuple(new.shape) != tuple(need):
            raise ValueError(
                f"{path}.{name}: {method.name} gave the shape {tuple(new.shape)}, need {tuple(need)}; correct the "
                "method"
            )
        if not bool(all_finite(partition(new)[0])):
            raise ValueError(
                f"{path}.{name}: {method.name} gave NaN or infinite values, need finite ones; use other data"
            )
    return result
