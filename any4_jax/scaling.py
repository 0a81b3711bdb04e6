"""Group scales and offsets: the one implementation and the one convention.

A group is G consecutive inputs of one output row; the last group of a row is short where G does not divide K.
With n bits and h = 2^(n-1), a group is mapped by u = (w - offset) / scale onto a table centred at zero:

    asymmetric    scale = max(max w - min w, 1e-6) / (2^n - 1)   offset = min w + h * scale      u in [-h, h - 1]
    integer_zero  the same over a range widened to hold 0        offset = (h - z) * scale        z an integer code
    symmetric     scale = max(max|w|, 1e-6) / (h - 1)            no offset                       u in [1 - h, h - 1]
    absmax        scale = max|w|                                 no offset                       u in [-1, 1]
    e8m0_*        scale = 2^e, e from max|w|                     no offset                       u in about [-6, 6]
    none          scale = 1                                      no offset                       u = w

All arithmetic is in float32, whatever the dtype of the weights. Results are rounded to their stored dtype here, so that
codes and tables are chosen for the scales that are stored.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from any4_jax.formats import ScaleRule

_FLOOR = 1e-6
"""Smallest range of a group, as in the code of arXiv 2507.04610. It keeps a constant group from dividing by zero."""


class GroupScales(NamedTuple):
    """Scales [..., N, ceil(K/G)] and offsets of the same shape, or None where the rule has none."""

    scales: jax.Array
    offsets: jax.Array | None


def rounded(values: jax.Array, dtype) -> jax.Array:
    """float32 values rounded to the dtype in which they are stored. A cast alone is not enough: XLA may drop a cast to
    bfloat16 that is followed by one back to float32, and codes would then be chosen for values that aren't stored."""
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(values, info.nexp, info.nmant).astype(dtype)


def group_count(k: int, group_size: int) -> int:
    """Number of groups in a row of `k` weights; the last may be short."""
    return -(-k // group_size)


def check_group_size(group_size: int) -> None:
    """Raises ValueError for a group size below 1."""
    if group_size < 1:
        raise ValueError(f"got group_size={group_size}, a group holds at least 1 weight; pass a positive group_size")


def check_stored_dtype(field: str, dtype: str) -> None:
    """Raises ValueError unless `dtype` names a dtype for tables, scales and offsets: a float of 16 or 32 bits."""
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"got {field}={dtype!r}, need 'bfloat16', 'float16' or 'float32'; choose one of these")


def to_groups(w: jax.Array, group_size: int) -> jax.Array:
    """[..., K] to [..., ceil(K/G), G]; a short last group repeats the row's last weight, which changes no extremum."""
    short = -w.shape[-1] % group_size
    padded = jnp.pad(w, [(0, 0)] * (w.ndim - 1) + [(0, short)], mode="edge")
    return padded.reshape(*w.shape[:-1], -1, group_size)


def expand(per_group: jax.Array, group_size: int, k: int) -> jax.Array:
    """[..., ceil(K/G)] to [..., K]: repeats each group's value for each of its weights."""
    return jnp.repeat(per_group, group_size, axis=-1)[..., :k]


def group_scales(w: jax.Array, group_size: int, *, rule: ScaleRule, bits: int, dtype) -> GroupScales:
    """Scale and offset of every group, rounded to `dtype`.

    Args:
      w: [..., N, K] weights, any float dtype.
      group_size: G >= 1; larger than K means the whole row.
      rule: see the module's table.
      bits: width of a code.
      dtype: stored dtype of scales and offsets; the e8m0 rules store uint8 exponents instead.

    Raises:
      ValueError: group_size < 1.
    """
    check_group_size(group_size)
    w = w.astype(jnp.float32)
    if rule == "none":
        return GroupScales(jnp.ones((*w.shape[:-1], group_count(w.shape[-1], group_size)), dtype), None)
    groups = to_groups(w, min(group_size, w.shape[-1]))
    if rule in ("asymmetric", "integer_zero"):
        return _asymmetric(groups, bits, dtype, integer_zero=rule == "integer_zero")
    absmax = jnp.abs(groups).max(axis=-1)
    if rule == "symmetric":
        return GroupScales(rounded(jnp.maximum(absmax, _FLOOR) / max(2 ** (bits - 1) - 1, 1), dtype), None)
    if rule == "absmax":
        return GroupScales(rounded(absmax, dtype), None)
    return GroupScales(_e8m0_exponent(absmax, round_mantissa=rule == "e8m0_round"), None)


def _asymmetric(groups: jax.Array, bits: int, dtype, *, integer_zero: bool) -> GroupScales:
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    half = 2 ** (bits - 1)
    if integer_zero:
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    scales = rounded(jnp.maximum(high - low, _FLOOR) / (2**bits - 1), dtype)
    step = scales.astype(jnp.float32)
    if integer_zero:
        zero = jnp.clip(jnp.round(-low / step), 0, 2**bits - 1)
        return GroupScales(scales, rounded((half - zero) * step, dtype))
    return GroupScales(scales, rounded(low + half * step, dtype))


def _e8m0_exponent(absmax: jax.Array, *, round_mantissa: bool) -> jax.Array:
    """Biased exponent of the group's power of two, so that max|w| lands in e2m1's top binade [4, 8).

    The OCP rule takes floor(log2 absmax). "round" first rounds absmax to a power of two, halves up, so that a maximum
    of at least 1.5 times a power of two moves up a binade instead of saturating at 6. A zero group gets exponent 0.
    """
    bits = jax.lax.bitcast_convert_type(absmax, jnp.int32)
    if round_mantissa:
        bits = bits + (1 << 22)
    return jnp.clip((bits >> 23) - 2, 0, 254).astype(jnp.uint8)


def scale_values(scales: jax.Array) -> jax.Array:
    """Stored scales as float32; uint8 scales are e8m0 exponents, 2^(e - 127)."""
    if scales.dtype == jnp.uint8:
        # 2^-127 is subnormal, and XLA may flush it to zero. Only groups of zeros have it, and zero is right for them.
        return jax.lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)
    return scales.astype(jnp.float32)


def normalize(w: jax.Array, scales: jax.Array, offsets: jax.Array | None, group_size: int) -> jax.Array:
    """u = (w - offset) / scale, float32 [..., N, K]; a group whose scale is zero gives zeros.

    Args:
      w: [..., N, K], any float dtype.
      scales, offsets: stored ones [..., N, ceil(K/G)], see `group_scales`; offsets may be None.
      group_size: G.
    """
    k = w.shape[-1]
    values = scale_values(scales)
    u = w.astype(jnp.float32)
    if offsets is not None:
        u = u - expand(offsets.astype(jnp.float32), group_size, k)
    inverse = expand(values, group_size, k)
    return jnp.where(inverse == 0, 0.0, u / jnp.where(inverse == 0, 1.0, inverse))
