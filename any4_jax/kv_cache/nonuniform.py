"""Tokens as packed codes of levels that were learned, with the outliers of each token kept as they are.

Letters as in `kv_cache.base`; N tokens of one row, C = Hkv * D channels. A number is

    offset + scale * levels[code],

where the offset and the scale belong to a channel (keys) or to a token (values). The numbers of a token that are
farthest out have a slot each: their value in the cache's dtype, and their channel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from any4_jax.packing import Planes, pack, unpack
from any4_jax.scaling import rounded


class Levels(NamedTuple):
    """The learned numbers of one block, in float32.

    Attributes:
        keys: [2^bits], ascending.
        scales, offsets: [Hkv, D], of the channels of keys.
        values: [2^bits], ascending.
    """

    keys: jax.Array
    scales: jax.Array
    offsets: jax.Array
    values: jax.Array


class TokenCodes(NamedTuple):
    """Keys or values of tokens, [Hkv, N, D] or with more axes before these.

    Attributes:
        packed: uint8 [Hkv, N, ceil(D * bits / 8)], or a tuple of planes; in the layout of `any4_jax.packing`.
        outliers: [1, N, O], the values of the token's O slots.
        channels: uint8 or uint16 [1, N, O], where these stand among the C channels.
        ranges: [1, N, 2], the token's scale and offset; None for keys, whose channels have them.
    """

    packed: Planes
    outliers: jax.Array
    channels: jax.Array
    ranges: jax.Array | None


def by_token(x: jax.Array) -> jax.Array:
    """[Hkv, N, D] -> [N, C]."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


def nearest(z: jax.Array, levels: jax.Array) -> jax.Array:
    """uint8, the code of the nearest of the ascending levels [k] to each of z; ties take the lower one."""
    between = (levels[1:] + levels[:-1]) * 0.5
    shape = (-1,) + (1,) * z.ndim
    return (z[None] > between.reshape(shape)).sum(axis=0, dtype=jnp.uint8)


def key_slots(x: jax.Array, scales: jax.Array, offsets: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """Keys x float32 [N, C] in units of their channels, and the channels int32 [N, O] of the O farthest out."""
    z = (x - offsets.reshape(1, -1)) / scales.reshape(1, -1)
    return z, jax.lax.top_k(jnp.abs(z), slots)[1]


def value_slots(x: jax.Array, slots: int, dtype: DTypeLike) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values x float32 [N, C] in units of their tokens, the ranges [N, 2] of these in `dtype`, and the channels
    int32 [N, O] of the O / 2 highest and O / 2 lowest. The range is that of the others."""
    side = slots // 2
    highest, up = jax.lax.top_k(x, side + 1)
    lowest, down = jax.lax.top_k(-x, side + 1)
    top, bottom = highest[:, side:], -lowest[:, side:]
    ranges = rounded(jnp.concatenate([(top - bottom) * 0.5, (top + bottom) * 0.5], axis=1), dtype)
    scale, offset = (ranges[:, i : i + 1].astype(jnp.float32) for i in (0, 1))
    # A token whose numbers are all equal is its offset; XLA may flush a subnormal scale to zero.
    flat = scale < jnp.finfo(jnp.float32).tiny
    z = jnp.where(flat, 0.0, (x - offset) / jnp.where(flat, 1.0, scale))
    return z, ranges, jnp.concatenate([up[:, :side], down[:, :side]], axis=1)


def encode_keys(x: jax.Array, levels: Levels, bits: int, slots: int) -> TokenCodes:
    """The codes of keys [Hkv, N, D], before their rotation."""
    z, channels = key_slots(by_token(x).astype(jnp.float32), levels.scales, levels.offsets, slots)
    return _codes(x, z, levels.keys, bits, channels, None)


def encode_values(x: jax.Array, levels: Levels, bits: int, slots: int) -> TokenCodes:
    """The codes of values [Hkv, N, D]."""
    z, ranges, channels = value_slots(by_token(x).astype(jnp.float32), slots, x.dtype)
    return _codes(x, z, levels.values, bits, channels, ranges[None])


def decode_keys(codes: TokenCodes, levels: Levels, bits: int) -> jax.Array:
    """The inverse of `encode_keys`, with a row for each of a batch: float32 [B, Hkv, N, D]."""
    heads, size = levels.scales.shape
    z = _taken(levels.keys, codes.packed, bits, size)
    shape = 1, heads, 1, size
    return _with_outliers(z * levels.scales.reshape(shape) + levels.offsets.reshape(shape), codes)


def decode_values(codes: TokenCodes, levels: Levels, bits: int) -> jax.Array:
    """The inverse of `encode_values`: float32 [B, Hkv, N, D]."""
    assert codes.ranges is not None
    z = _taken(levels.values, codes.packed, bits, levels.scales.shape[1])
    scale, offset = (codes.ranges[..., i : i + 1].astype(jnp.float32) for i in (0, 1))
    return _with_outliers(z * scale + offset, codes)


def _codes(
    x: jax.Array, z: jax.Array, levels: jax.Array, bits: int, channels: jax.Array, ranges: jax.Array | None
) -> TokenCodes:
    heads, count, size = x.shape
    packed = pack(nearest(z, levels).reshape(count, heads, size).swapaxes(0, 1), bits)
    outliers = jnp.take_along_axis(by_token(x), channels, axis=1)
    dtype = jnp.uint8 if heads * size <= 256 else jnp.uint16
    return TokenCodes(packed, outliers[None], channels.astype(dtype)[None], ranges)


def _taken(levels: jax.Array, packed: Planes, bits: int, count: int) -> jax.Array:
    return jnp.take(levels, unpack(packed, bits, count).astype(jnp.int32), mode="clip")


def _with_outliers(x: jax.Array, codes: TokenCodes) -> jax.Array:
    """x [B, Hkv, N, D] with the outliers in their places."""
    batch, heads, count, size = x.shape
    channels = codes.channels.astype(jnp.int32)
    head, channel = jax.lax.div(channels, jnp.int32(size)), jax.lax.rem(channels, jnp.int32(size))
    row = jnp.arange(batch, dtype=jnp.int32).reshape(-1, 1, 1, 1)
    token = jnp.arange(count, dtype=jnp.int32).reshape(1, 1, -1, 1)
    return x.at[row, head, token, channel].set(codes.outliers.astype(x.dtype), mode="promise_in_bounds")
