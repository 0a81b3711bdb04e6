"""Inputs rounded on the fly before a product: the arithmetic behind the operator `QuantizeInput`."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax import formats, scaling
from any4_jax.weights import QuantizeInput, Slice, is_operator, leaf_of

GROUP = 32
"""How many inputs of a row share a scale where `QuantizeInput.per` is "group"; the last group of a row may be short."""

LONGEST_GROUP = 2**18
"""The most weights of a group whose products with 8-bit inputs a kernel adds up in integers of 32 bits."""


def is_integer_product(w: QuantizeInput) -> bool:
    """Whether XLA can multiply x and the weight's codes as int8: x is rounded to integers with one scale for a whole
    row or for all of x, the codes index a ramp, and scales and offsets are plain arrays."""
    leaf = leaf_of(w.inner)
    if leaf is None or w.levels is not None or w.per == "group":
        return False
    return leaf.uniform and not is_operator(leaf.scales) and not is_operator(leaf.offsets)


def why_no_bytes(w: QuantizeInput) -> str | None:
    """Why no kernel multiplies rounded x and the weight as integers of 8 bits; None if one does.

    A weight is such integers where it looks up a table of int8, or where its codes count the steps of a ramp.
    """
    leaf = leaf_of(w.inner)
    if leaf is None:
        return f"it multiplies rounded x by the codes of a QuantizedTensor, the weight is a {type(w.inner).__name__}"
    if w.levels is not None:
        return "x is rounded to a table of levels, it takes integers"
    by_group = w.per == "group"
    if by_group and (not w.symmetric or w.bits != 8):
        return "with a scale for each group of inputs it takes x rounded to symmetric integers of 8 bits"
    if not leaf.uniform and (leaf.bits > 4 or leaf.lut.dtype != jnp.int8):
        return f"the table is {leaf.lut.dtype} of {2**leaf.bits} entries, it takes at most 16 of int8, or a ramp"
    k, multiple = leaf.shape[-1], GROUP if by_group else 8
    if leaf.group_size % multiple and leaf.group_size < k:
        return f"groups have {leaf.group_size} weights, it takes multiples of {multiple}"
    if not by_group and min(leaf.group_size, k) > LONGEST_GROUP:
        return (
            f"groups have {min(leaf.group_size, k)} weights, it takes at most {LONGEST_GROUP}, whose sums fit 32 bits"
        )
    return None


def quantize_input(x: jax.Array, w: QuantizeInput) -> jax.Array:
    """x [M, K] rounded onto the grid of `w`, in x's dtype. Gradients pass straight through to x: the derivative of the
    rounding itself is zero nearly everywhere, and nothing before it could be trained."""
    grouped = _grouped(x.astype(jnp.float32), w.per)
    if w.levels is not None:
        scale = _largest(grouped, w)
        levels = w.levels.astype(jnp.float32)
        rounded = levels[formats.nearest(_rows(grouped / scale), levels[None])].reshape(grouped.shape) * scale
    else:
        q, scale, zero = _integer_input(grouped, w)
        rounded = (q - zero) * scale
    rounded = rounded.reshape(x.shape[0], math.prod(grouped.shape[1:]))[:, : x.shape[1]].astype(x.dtype)
    return scaling.straight_through(rounded, x)


def product_of_rounded(x: jax.Array, w: QuantizeInput, product: Callable[..., jax.Array]) -> jax.Array:
    """x [M, K], quantized, by the weight [N, K], as `product(w.inner, rounded x)` computes it: [M, N] in x's dtype."""
    if w.per != "group":
        return product(w.inner, quantize_input(x, w))
    return product(w.inner, quantize_input(x.astype(jnp.float32), w)).astype(x.dtype)


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _grouped(x: jax.Array, per: str) -> jax.Array:
    """x [M, K] with an axis for the groups, [M, ceil(K / GROUP), GROUP] with zeros at the end, where there are any."""
    if per != "group":
        return x
    m, k = x.shape
    return jnp.pad(x, ((0, 0), (0, -k % GROUP))).reshape(m, -(-k // GROUP), GROUP)


def _largest(x: jax.Array, w: QuantizeInput) -> jax.Array:
    """The |x| at which the grid ends: the largest of each row, group or of all of x, or `w.scale`; float32."""
    if w.scale is None:
        axis = None if w.per == "tensor" else -1
        largest = jnp.abs(x).max(axis=axis, keepdims=True, initial=0.0)
    else:
        largest = w.scale.astype(jnp.float32).reshape((1,) * x.ndim)
    # The inverse of anything smaller could overflow. Inputs that small are zeros.
    return jnp.where(largest < _SMALLEST, 1.0, largest)


_SMALLEST = np.float32(2.0**-100)


def _integer_input(x: jax.Array, w: QuantizeInput) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(q, scale, zero), float32, the first of x's shape, such that the float32 x is close to (q - zero) * scale.

    The values of q are integers from -2^(bits-1) to 2^(bits-1) - 1.
    """
    inverse, scale, zero = input_grid(x, w)
    half = 2 ** (w.bits - 1)
    return jnp.clip(jnp.round(x * inverse) + zero, -half, half - 1), scale, zero


def input_grid(x: jax.Array, w: QuantizeInput) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(1 / scale, scale, zero) of float32 x: float32, with an axis of 1 for the last axis of x, or for all of them."""
    half = 2 ** (w.bits - 1)
    # Products with constants and inverses, since XLA makes quotients into such where it can, and kernels have to find
    # the same integers.
    if w.symmetric:
        largest = _largest(x, w)
        scale = largest * np.float32(1 / (half - 1))
        return (half - 1) / largest, scale, jnp.zeros_like(scale)
    axis = None if w.per == "tensor" else -1
    low = x.min(axis=axis, keepdims=True, initial=0.0)
    span = x.max(axis=axis, keepdims=True, initial=0.0) - low
    span = jnp.where(span < _SMALLEST, 1.0, span)
    inverse = (2 * half - 1) / span
    return inverse, span * np.float32(1 / (2 * half - 1)), -half - jnp.round(low * inverse)


def integer_product(x: jax.Array, w: QuantizeInput) -> jax.Array:
    """x [M, K], quantized, by a weight [N, K]: [M, N] in x's dtype, computed group by group in int8 arithmetic.

    `is_integer_product` holds for the weight. With x = a (q - z) and W = s (b + d c) + o per group, for signed codes c,
    table middle b and step d:
    y = a * sum over groups of [ s d (q.c - z sum c) + (s b + o) (sum q - z G) ].
    """
    leaf = w.inner.matrix() if isinstance(w.inner, Slice) else w.inner
    q, a, z = _integer_input(x.astype(jnp.float32), w)
    k, group = leaf.shape[-1], min(leaf.group_size, leaf.shape[-1])
    short = -k % group
    q8 = jnp.pad(q.astype(jnp.int8), ((0, 0), (0, short))).reshape(q.shape[0], (k + short) // group, group)
    half = 2 ** (leaf.bits - 1)
    c8 = jax.lax.bitcast_convert_type(leaf.unpacked_codes() - jnp.uint8(half), jnp.int8)
    c8 = jnp.pad(c8, ((0, 0), (0, short))).reshape(c8.shape[0], (k + short) // group, group)
    qc = jax.lax.dot_general(q8, c8, (((2,), (2,)), ((1,), (1,))), preferred_element_type=jnp.int32)  # [groups, M, N]
    sum_q = q8.sum(axis=2, dtype=jnp.int32).T[:, :, None]
    sum_c = c8.sum(axis=2, dtype=jnp.int32).T[:, None, :]
    sizes = jnp.asarray(np.minimum(group, k - group * np.arange(q8.shape[1])), jnp.float32)[:, None, None]
    table = leaf.lut.astype(jnp.float32)
    middle, step = table[None, None, :, half], (table[:, 1] - table[:, 0])[None, None]
    s = scaling.scale_values(leaf.scales).T[:, None, :]
    shift = s * middle + (0.0 if leaf.offsets is None else leaf.offsets.astype(jnp.float32).T[:, None, :])
    z = z[None]
    qc, sum_q, sum_c = (whole.astype(jnp.float32) for whole in (qc, sum_q, sum_c))
    by_group = s * step * (qc - z * sum_c) + shift * (sum_q - z * sizes)
    return (a * by_group.sum(axis=0)).astype(x.dtype)
