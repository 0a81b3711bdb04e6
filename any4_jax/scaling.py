"""Group scales and offsets: the one implementation and the one convention.

A group is G consecutive inputs of one output row; the last group of a row is short where G does not divide K.
With n bits and h = 2^(n-1), a group is mapped by u = (w - offset) / scale onto a table centred at zero:

    asymmetric    scale = (max w - min w) / (2^n - 1)            offset = min w + h * scale      u in [-h, h - 1]
    integer_zero  the same over a range widened to hold 0        offset = (h - z) * scale        z an integer code
    symmetric     scale = max|w| / (h - 1)                       no offset                       u in [1 - h, h - 1]
    absmax        scale = max|w|                                 no offset                       u in [-1, 1]
    e8m0_*        scale = 2^e, e from max|w|                     no offset                       u in about [-6, 6]
    none          scale = 1                                      no offset                       u = w

A group without extent (all weights equal where there is an offset, all zero elsewhere) has the scale 0 and u = 0.

All arithmetic is in float32, whatever the dtype of the weights. Results are rounded to their stored dtype here, so that
codes and tables are chosen for the scales that are stored. No constant has the size of a weight, so w * 2^k gives
scales and offsets times 2^k. Squares of weights leave float32 long before weights do: what squares them works on
weights over a `unit`, and puts its results back by `in_units`.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from any4_jax.formats import ScaleRule

_LOST_EXPONENT = 255
"""OCP's e8m0 keeps this exponent for NaN."""


StoredDtype = Literal["bfloat16", "float16", "float32"]
"""The dtypes of tables, scales and offsets, except for e8m0 exponents and tables of integers."""

TableDtype = Literal[StoredDtype, "int8"]
"""The dtypes of learned tables. Integers have a smaller group scale, so that the law stands as it is."""


class GroupScales(NamedTuple):
    """Scales [..., N, ceil(K/G)] and offsets of the same shape, or None where the rule has none."""

    scales: jax.Array
    offsets: jax.Array | None


def rounded(values: jax.Array, dtype) -> jax.Array:
    """float32 values rounded to the dtype in which they are stored, integers to the nearest from -127 to 127. A cast
    alone is not enough: XLA may drop a cast to bfloat16 that is followed by one back to float32, and codes would then
    be chosen for values that aren't stored."""
    if jnp.issubdtype(dtype, jnp.signedinteger):
        most = largest_integer(dtype)
        return jnp.clip(jnp.round(values), -most, most).astype(dtype)
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(values, info.nexp, info.nmant).astype(dtype)


@jax.custom_jvp
def straight_through(stored: jax.Array, smooth: jax.Array) -> jax.Array:
    """`stored`, with the derivative of `smooth`: a rounding that gradients pass as if it weren't there."""
    return jnp.broadcast_to(stored, jnp.broadcast_shapes(stored.shape, smooth.shape))


@straight_through.defjvp
def _(primals, tangents):
    value = straight_through(*primals)
    return value, jnp.broadcast_to(tangents[1], value.shape).astype(value.dtype)


def largest_integer(dtype) -> int:
    """The largest magnitude of a table of integers, for int8 127: as many lie below zero as above it."""
    return int(jnp.iinfo(dtype).max)


def group_count(k: int, group_size: int) -> int:
    """Number of groups in a row of `k` weights; the last may be short."""
    return -(-k // group_size)


def check_group_size(group_size: int) -> None:
    """Raises ValueError for a group size below 1."""
    if group_size < 1:
        raise ValueError(f"got group_size={group_size}, a group holds at least 1 weight; pass a positive group_size")


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
    extent = _extent(groups, rule)
    if rule in ("e8m0_round", "e8m0_ocp"):
        return GroupScales(_e8m0_exponent(extent, round_mantissa=rule == "e8m0_round"), None)
    if rule == "absmax":
        return GroupScales(rounded(extent, dtype), None)
    half = 2 ** (bits - 1)
    if rule == "symmetric":
        return GroupScales(rounded(extent / max(half - 1, 1), dtype), None)
    scales = rounded(extent / (2**bits - 1), dtype)
    step, low = scales.astype(jnp.float32), groups.min(axis=-1)
    if rule == "asymmetric":
        return GroupScales(scales, rounded(low + half * step, dtype))
    zero = jnp.round(-jnp.minimum(low, 0.0) / jnp.where(step == 0, 1.0, step))
    return GroupScales(scales, rounded((half - jnp.clip(zero, 0, 2**bits - 1)) * step, dtype))


def _extent(groups: jax.Array, rule: ScaleRule) -> jax.Array:
    """What a group's scale is proportional to: [..., groups] of [..., groups, G]."""
    if rule not in ("asymmetric", "integer_zero"):
        return jnp.abs(groups).max(axis=-1)
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    if rule == "integer_zero":
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    return high - low


def _e8m0_exponent(absmax: jax.Array, *, round_mantissa: bool) -> jax.Array:
    """Biased exponent of the group's power of two, so that max|w| lands in e2m1's top binade [4, 8).

    The OCP rule takes floor(log2 absmax). "round" first rounds absmax to a power of two, halves up, so that a maximum
    of at least 1.5 times a power of two moves up a binade instead of saturating at 6. A zero group gets exponent 0, as
    does one that is too small for its exponent.
    """
    bits = jax.lax.bitcast_convert_type(absmax, jnp.int32)
    if round_mantissa:
        bits = bits + (1 << 22)
    return jnp.clip((bits >> 23) - 2, 0, 254).astype(jnp.uint8)


def power_of_two(largest: jax.Array) -> jax.Array:
    """The largest power of two <= `largest`, float32 and not negative, within 2^-126 .. 2^126; 1 for zero."""
    bits = jax.lax.bitcast_convert_type(largest.astype(jnp.float32), jnp.int32) & 0x7F800000
    power = jax.lax.bitcast_convert_type(jnp.minimum(bits, 253 << 23), jnp.float32)
    return jnp.where(bits > 0, power, 1.0)


def unit(w: jax.Array, dtype, axis: int | None = -1) -> jax.Array:
    """A power of two that the weights may be divided by, which is exact and changes no bit of what follows but its
    exponent: close to max|w| over an axis (None for all), of the shape of w with ones for it.

    It is 1 where results are stored in float16 or in e8m0. Float16 has so few exponents that the weights which it can
    scale need no unit; and a scale must be rounded where it is stored.
    """
    shape = jnp.max(jnp.abs(w), axis=axis, keepdims=True)
    wide = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).nexp == jnp.finfo(jnp.float32).nexp
    return power_of_two(shape) if wide else jnp.ones_like(shape)


def in_units(values: jax.Array, unit: jax.Array) -> jax.Array:
    """Stored values times a power of two that broadcasts with them. What the dtype can't hold becomes infinite if it is
    too large, and NaN if it is too small."""
    whole = values.astype(jnp.float32)
    moved = (whole * unit).astype(values.dtype)
    return jnp.where((whole != 0) & ~_is_normal(moved), jnp.nan, moved.astype(jnp.float32)).astype(values.dtype)


def marked(scales: jax.Array, w: jax.Array, group_size: int, rule: ScaleRule) -> jax.Array:
    """Scales [..., N, ceil(K/G)] of weights w [..., N, K], with NaN (for e8m0 255, its NaN) where a group has an extent
    but its scale is zero or subnormal: so small a scale loses the group."""
    extent = _extent(to_groups(w.astype(jnp.float32), min(group_size, w.shape[-1])), rule)
    nothing = _LOST_EXPONENT if scales.dtype == jnp.uint8 else jnp.nan
    return jnp.where((extent > 0) & ~_is_normal(scales), nothing, scales).astype(scales.dtype)


def _is_normal(values: jax.Array) -> jax.Array:
    """Whether stored values are neither zero nor subnormal; so are NaN and infinity."""
    if values.dtype == jnp.uint8:
        return values > 0
    return ~(jnp.abs(values.astype(jnp.float32)) < float(jnp.finfo(values.dtype).tiny))


def is_lost(values: jax.Array) -> jax.Array:
    """Which stored scales `marked` or `in_units` found too small, bool of the shape of values."""
    return values == _LOST_EXPONENT if values.dtype == jnp.uint8 else jnp.isnan(values)


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
