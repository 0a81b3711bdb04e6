"""Normalization layers of decoders."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


class RMSNorm(nnx.Module):
    """x / rms(x) * scale (arXiv:1910.07467, eq. 4); the quotient is float32, and rounded to x's dtype before the
    product."""

    def __init__(self, size: int, *, eps: float, param_dtype: DTypeLike) -> None:
        """A norm over `size` channels; `eps` is added to the mean square."""
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., size] -> the same shape and dtype."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale[...].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
