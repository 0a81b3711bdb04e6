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
        return _normalized(x, self.eps).astype(x.dtype) * _like(self.scale[...], x).astype(x.dtype)


class OffsetRMSNorm(nnx.Module):
    """x / rms(x) * (1 + scale), in float32 and rounded once to x's dtype: the norm of Gemma (arXiv:2403.08295)."""

    def __init__(self, size: int, *, eps: float, param_dtype: DTypeLike) -> None:
        """A norm over `size` channels; `eps` is added to the mean square."""
        self.eps = eps
        self.scale = nnx.Param(jnp.zeros((size,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., size] -> the same shape and dtype."""
        scale = 1 + _like(self.scale[...], x).astype(jnp.float32)
        return (_normalized(x, self.eps) * scale).astype(x.dtype)


def _normalized(x: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)


def _like(scale: jax.Array, x: jax.Array) -> jax.Array:
    """A scale [size] with the rank of x, which jax may be set to ask for."""
    return scale.reshape((1,) * (x.ndim - 1) + (-1,))
