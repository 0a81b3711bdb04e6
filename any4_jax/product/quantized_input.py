"""Inputs rounded on the fly before a product: the arithmetic behind the operator `QuantizeInput`."""

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax import formats, scaling
from any4_jax.weights import QuantizeInput, Slice, is_operator, leaf_of


def is_integer_product(w: QuantizeInput) -> bool:
    """Whether x and the weight's codes can be multiplied as int8: x is rounded to integers, the codes are 8 bits wide
    and index a ramp, and scales and offsets are plain arrays."""
    leaf = leaf_of(w.inner)
    if leaf is None or w.levels is not None:
        return False
    return leaf.bits == 8 and leaf.uniform and not is_operator(leaf.scales) and not is_operator(leaf.offsets)


def quantize_input(x: jax.Array, w: QuantizeInput) -> jax.Array:
    """x [M, K] rounded onto the grid of `w`, in x's dtype."""
    if w.levels is not None:
        scale = _absmax(x, w.per)
        levels = w.levels.astype(jnp.float32)
        rounded = levels[formats.nearest(x.astype(jnp.float32) / scale, levels[None])]
        return (rounded * scale).astype(x.dtype)
    q, scale, zero = _integer_input(x, w)
    return ((q - zero) * scale).astype(x.dtype)


def _absmax(x: jax.Array, per: str) -> jax.Array:
    axis = -1 if per == "token" else None
    largest = jnp.abs(x.astype(jnp.float32)).max(axis=axis, keepdims=True, initial=0.0)
    return jnp.where(largest == 0, 1.0, largest)


def _integer_input(x: jax.Array, w: QuantizeInput) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(q, scale, zero), float32 [M, K], [M or 1, 1] and [M or 1, 1], such that x is close to (q - zero) * scale. The
    values of q are integers from -2^(bits-1) to 2^(bits-1) - 1."""
    half = 2 ** (w.bits - 1)
    x = x.astype(jnp.float32)
    if w.symmetric:
        scale = _absmax(x, w.per) / (half - 1)
        return jnp.clip(jnp.round(x / scale), -half, half - 1), scale, jnp.zeros_like(scale)
    axis = -1 if w.per == "token" else None
    low = x.min(axis=axis, keepdims=True, initial=0.0)
    high = x.max(axis=axis, keepdims=True, initial=0.0)
    scale = jnp.where(high > low, (high - low) / (2 * half - 1), 1.0)
    zero = -half - jnp.round(low / scale)
    return jnp.clip(jnp.round(x / scale) + zero, -half, half - 1), scale, zero


def integer_product(x: jax.Array, w: QuantizeInput) -> jax.Array:
    """x [M, K], quantized, by a weight [N, K]: [M, N] in x's dtype, computed group by group in int8 arithmetic.

    `is_integer_product` holds for the weight. With x = a (q - z) and W = s (b + d c) + o per group, for signed codes c,
    table middle b and step d:
    y = a * sum over groups of [ s d (q.c - z sum c) + (s b + o) (sum q - z G) ].
    """
    leaf = w.inner.matrix() if isinstance(w.inner, Slice) else w.inner
    q, a, z = _integer_input(x, w)
    k, group = leaf.shape[-1], min(leaf.group_size, leaf.shape[-1])
    short = -k % group
    q8 = jnp.pad(q.astype(jnp.int8), ((0, 0), (0, short))).reshape(q.shape[0], (k + short) // group, group)
    c8 = jax.lax.bitcast_convert_type(leaf.unpacked_codes() ^ jnp.uint8(128), jnp.int8)
    c8 = jnp.pad(c8, ((0, 0), (0, short))).reshape(c8.shape[0], (k + short) // group, group)
    qc = jax.lax.dot_general(q8, c8, (((2,), (2,)), ((1,), (1,))), preferred_element_type=jnp.int32)  # [groups, M, N]
    sum_q = q8.sum(axis=2, dtype=jnp.int32).T[:, :, None]
    sum_c = c8.sum(axis=2, dtype=jnp.int32).T[:, None, :]
    sizes = jnp.asarray(np.minimum(group, k - group * np.arange(q8.shape[1])), jnp.float32)[:, None, None]
    table = leaf.lut.astype(jnp.float32)
    middle, step = table[None, None, :, 128], (table[:, 1] - table[:, 0])[None, None]
    s = scaling.scale_values(leaf.scales).T[:, None, :]
    shift = s * middle + (0.0 if leaf.offsets is None else leaf.offsets.astype(jnp.float32).T[:, None, :])
    z = z[None]
    qc, sum_q, sum_c = (whole.astype(jnp.float32) for whole in (qc, sum_q, sum_c))
    by_group = s * step * (qc - z * sum_c) + shift * (sum_q - z * sizes)
    return (a * by_group.sum(axis=0)).astype(x.dtype)
