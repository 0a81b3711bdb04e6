"""Groups of weights as sums of scaled signs: w ~ sum_i a_i b_i + z, with b_i in {-1, +1} (BCQ).

All arrays are float32 with the weights of a group along their last axis, g. `h` says how much each weight counts in the
error sum_k h_k (w_k - w^_k)^2; zeros fill up a group that is short.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Coding(NamedTuple):
    """The scales a [..., q] and the offset z [...] of groups. Their 2^q levels are z + sum_i (+-a_i)."""

    scales: jax.Array
    offset: jax.Array


def greedy(w: jax.Array, h: jax.Array, planes: int, *, offset: bool) -> Coding:
    """Scales one after another: a plane takes the signs of what the planes before it leave, and their mean magnitude.

    With `offset`, z is the mean of the group, else zero.
    """
    z = _mean(w, h) if offset else jnp.zeros(w.shape[:-1])
    left, scales = w - z[..., None], []
    for _ in range(planes):
        scales.append(_mean(jnp.abs(left), h))
        left = left - jnp.where(left >= 0, 1.0, -1.0) * scales[-1][..., None]
    return Coding(jnp.stack(scales, axis=-1), z)


def _mean(values: jax.Array, h: jax.Array) -> jax.Array:
    return (values * h).sum(axis=-1) / h.sum(axis=-1)


def nearest(w: jax.Array, coding: Coding) -> jax.Array:
    """The level nearest to each weight, the upper one of two: int32 [..., g], whose bit i is set where b_i = +1."""
    levels, patterns = _ascending(_levels(coding.scales))
    middles = (levels[..., 1:] + levels[..., :-1]) / 2 + coding.offset[..., None]
    middles, steps = (jnp.moveaxis(a, -1, 0)[..., None] for a in (middles, patterns[..., 1:] - patterns[..., :-1]))
    return patterns[..., :1] + jnp.where(w >= middles, steps, 0).sum(axis=0)


def _levels(scales: jax.Array) -> jax.Array:
    """The sums [..., 2^q] of the signed scales, by pattern."""
    planes = scales.shape[-1]
    patterns = jnp.arange(2**planes)
    signed = (plane_signs(patterns, i) * scales[..., i, None] for i in range(planes))
    return sum(signed, start=jnp.zeros(2**planes))


def _ascending(levels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Levels [..., p] in ascending order, and their patterns; by ranks, since XLA sorts 16 values slowly."""
    patterns = jnp.arange(levels.shape[-1])
    one, other = levels[..., :, None], levels[..., None, :]
    ranks = ((other < one) | ((other == one) & (patterns < patterns[:, None]))).sum(axis=-1)
    here = ranks[..., None, :] == patterns[:, None]
    return jnp.where(here, other, 0.0).sum(axis=-1), jnp.where(here, patterns, 0).sum(axis=-1)


def plane_signs(patterns: jax.Array, plane: int) -> jax.Array:
    """b_i as floats, -1 and +1."""
    return jnp.where((patterns >> plane) & 1, 1.0, -1.0)


def refine(w: jax.Array, h: jax.Array, coding: Coding, *, offset: bool) -> Coding:
    """A round of alternating least squares: signs nearest for the coding, then the coding that is best for these signs.

    Neither step raises the error. Scales come back as magnitudes in descending order, which has the same levels.
    """
    planes = coding.scales.shape[-1]
    # Many sums read the patterns, and XLA would find them again for each.
    patterns = jax.lax.optimization_barrier(nearest(w, coding))
    columns = jnp.stack([plane_signs(patterns, i) for i in range(planes)] + [jnp.ones_like(w)] * offset + [w])
    products = jnp.moveaxis((columns[:, None] * columns * h).sum(axis=-1), (0, 1), (-2, -1))
    start = [coding.scales, coding.offset[..., None]] if offset else [coding.scales]
    found = _conjugate_gradient(products[..., :-1, :-1], products[..., :-1, -1], jnp.concatenate(start, axis=-1))
    scales = -jnp.sort(-jnp.abs(found[..., :planes]), axis=-1)
    return Coding(scales, found[..., planes] if offset else coding.offset)


_FLAT = 2.0**-20
"""Where the quadratic form rises by less than this share of its trace, its curvature is the rounding of float32: the
signs of two planes agree everywhere, say, and only the sum of their scales is determined."""


def _conjugate_gradient(matrix: jax.Array, right: jax.Array, x: jax.Array) -> jax.Array:
    """x [..., p] of matrix x = right after p steps from a start, for positive semidefinite matrices [..., p, p].

    As in the paper's implementation. Each step lowers the error, and directions that aren't determined are left alone,
    where a factorization would fail.
    """
    residual = right - _times(matrix, x)
    direction, size = residual, (residual**2).sum(axis=-1, keepdims=True)
    flat = _FLAT * jnp.trace(matrix, axis1=-2, axis2=-1)[..., None]
    for _ in range(x.shape[-1]):
        image = _times(matrix, direction)
        curvature = (direction * image).sum(axis=-1, keepdims=True)
        usable = curvature > flat * (direction**2).sum(axis=-1, keepdims=True)
        step = jnp.where(usable, size / jnp.where(usable, curvature, 1.0), 0.0)
        x, residual = x + step * direction, residual - step * image
        size, before = (residual**2).sum(axis=-1, keepdims=True), size
        direction = residual + size / jnp.where(before > 0, before, 1.0) * direction
    return x


def _times(matrix: jax.Array, x: jax.Array) -> jax.Array:
    return (matrix * x[..., None, :]).sum(axis=-1)
