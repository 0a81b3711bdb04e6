"""Products of one input with several weights, such as the query, key and value projections, in one kernel call."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax.product import plan
from any4_jax.product.backends.base import Backend
from any4_jax.product.matmul import matmul
from any4_jax.product.quantized_input import why_no_bytes
from any4_jax.weights import QuantizeInput, binary_planes, leaf_of


def matmul_each(x: jax.Array, ws: Sequence[Any]) -> tuple[jax.Array, ...]:
    """`matmul(x, w)` for each w, in one call where a kernel takes several weights at once, else one after the other.

    Weights share a call where they are QuantizedTensors [N, K], or slices of such, with the same bits and group size;
    so do sums of as many binary planes, and those that round x to the same integers (`QuantizeInput`).
    A call costs nearly as much for a small product as for a large one: when SmolLM2-135M decodes on 2 cores, seven
    calls a block become four.

    Args:
      x: [..., K], a floating dtype.
      ws: arrays or operators [N, K], each with its own N.

    Returns:
      y [..., N] in x's dtype for each w.

    Raises:
      ValueError, TypeError: as in `matmul`.
    """
    if not _alike(x, ws):
        return tuple(matmul(x, w) for w in ws)
    rows = x.reshape(-1, x.shape[-1])
    ys = plan.planned_each(rows, ws, _products)
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys)


def _alike(x: jax.Array, ws: Sequence[Any]) -> bool:
    if len(ws) < 2 or x.ndim == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        return False
    recipes = {_recipe(w) for w in ws}
    return len(recipes) == 1 and None not in recipes and ws[0].shape[-1] == x.shape[-1]


def _recipe(w: Any) -> tuple[Any, ...] | None:
    """What weights of one call agree in; None for one that has its own."""
    rounding = None
    if isinstance(w, QuantizeInput) and w.scale is None and why_no_bytes(w) is None:
        rounding, w = (w.bits, w.symmetric, w.per), w.inner
    planes = binary_planes(w) or (w,)
    leaf = leaf_of(planes[0]) if len(w.shape) == 2 else None
    return None if leaf is None else (rounding, len(planes), leaf.bits, leaf.group_size, leaf.shape[-1])


def _products(kernels: tuple[Backend, ...]) -> Callable[..., tuple[jax.Array, ...]]:
    if len({kernel.name for kernel in kernels}) == 1 and kernels[0].run_together is not None:
        return functools.partial(_together, backend=kernels[0].name)
    return functools.partial(_separately, kernels=kernels)


def _separately(x: jax.Array, ws: Sequence[Any], kernels: tuple[Backend, ...]) -> tuple[jax.Array, ...]:
    return tuple(plan.unnamed(kernel)(x, w) for w, kernel in zip(ws, kernels, strict=True))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _together(x: jax.Array, ws: tuple[Any, ...], backend: str) -> tuple[jax.Array, ...]:
    kernel = plan.BACKENDS.named(backend)
    assert kernel.run_together is not None
    return tuple(kernel.run_together(x, [plan.operand(kernel, w) for w in ws]))


@_together.defjvp
def _(backend, primals, tangents):
    (x, ws), (dx, dws) = primals, tangents
    return _together(x, ws, backend), tuple(plan.product_tangent(x, w, dx, dw) for w, dw in zip(ws, dws, strict=True))
