"""y = x W^T for every operator."""

from typing import Any

import jax
import jax.numpy as jnp

from any4_jax.product.plan import check_named
from any4_jax.weights import product


def matmul(x: jax.Array, w: Any, backend: str | None = None) -> jax.Array:
    """x W^T, [..., N] in x's dtype.

    The matrix is dequantized in float32 and rounded once to x's dtype; products accumulate in float32. Gradients
    flow to x and to the floating-point arrays of `w`; codes have none.

    Args:
      x: [..., K], a floating dtype.
      w: an array [N, K] or an operator of that shape.
      backend: a kernel's name, or None for the first that supports the operands on the platform that the program is
        lowered for. If `w` is an operator over others, the named kernel multiplies by those that kernels read, and XLA
        by the rest.

    Raises:
      ValueError: K differs, `w` has leading axes (index them by `take`, or use jax.vmap), or the named backend doesn't
        exist or can't compute the product.
      TypeError: x is not floating, or `w` is not an operator.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"got x of dtype {x.dtype}, need a floating dtype; convert x first")
    if len(w.shape) != 2:
        raise ValueError(
            f"got a weight of shape {w.shape}, matmul takes [N, K]; use `take` or jax.vmap over its leading axes"
        )
    if x.ndim == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"got x of shape {x.shape} and a weight [N, K] = {w.shape}; x must end in K={w.shape[1]}")
    if backend is not None:
        check_named(x, w, backend)
    y = product(w, x.reshape(-1, x.shape[-1]), backend)
    return y.reshape(*x.shape[:-1], w.shape[0])
