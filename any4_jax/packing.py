"""Codes to bytes and back, in the one canonical layout.

A code of 3, 5 or 6 bits is split into planes (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2), with its low bits in the first plane,
so that a code takes no more bits than it has. In a plane of width b, code k occupies bits b * (k mod 8/b) and up of
byte k // (8/b): the first code of a byte sits in its lowest bits. Zero codes fill the last byte.
Every kernel reads this layout as it is stored.
"""

import functools

import jax
import jax.numpy as jnp

PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Widths of the bit planes of a code, by its number of bits."""

Planes = jax.Array | tuple[jax.Array, ...]
"""One uint8 array where a code has one plane, else a tuple of them, widest first."""


def _widths(bits: int) -> tuple[int, ...]:
    if bits not in PLANES:
        raise ValueError(f"got bits={bits}, codes have {', '.join(map(str, PLANES))} bits; choose one of these")
    return PLANES[bits]


def plane_bytes(count: int, width: int) -> int:
    """Bytes that `count` codes take in a plane of `width` bits."""
    return -(-count * width // 8)


def padding(count: int, bits: int) -> int:
    """Number of zero codes that fill the last byte of the first plane.

    Raises:
      ValueError: codes can't have so many bits.
    """
    width = _widths(bits)[0]
    return plane_bytes(count, width) * 8 // width - count


# Jitted, so that a call outside of a program compiles one function for a new shape instead of a dozen operations.
@functools.partial(jax.jit, static_argnames="bits", inline=True)
def pack(codes: jax.Array, bits: int) -> Planes:
    """Packs codes.

    Args:
      codes: uint8 [..., K], each below 2**bits.
      bits: 1, 2, 3, 4, 5, 6 or 8.

    Returns:
      uint8 [..., ceil(K * width / 8)] for each width in PLANES[bits]: one array, or a tuple where there are several.

    Raises:
      ValueError: codes can't have so many bits.
      TypeError: codes are not uint8.
    """
    if codes.dtype != jnp.uint8:
        raise TypeError(f"got codes of dtype {codes.dtype}, need uint8; convert them first")
    planes = []
    shift = 0
    for width in _widths(bits):
        planes.append(_pack_plane((codes >> shift) & (2**width - 1), width))
        shift += width
    return planes[0] if len(planes) == 1 else tuple(planes)


@functools.partial(jax.jit, static_argnames=("bits", "count"), inline=True)
def unpack(planes: Planes, bits: int, count: int) -> jax.Array:
    """The inverse of `pack`: uint8 [..., count] codes from uint8 planes.

    Raises:
      ValueError: codes can't have so many bits, or there are too few or too many planes.
    """
    arrays = planes if isinstance(planes, tuple) else (planes,)
    shift = 0
    codes = None
    for plane, width in zip(arrays, _widths(bits), strict=True):
        part = _unpack_plane(plane, width)[..., :count] << shift
        codes = part if codes is None else codes | part
        shift += width
    assert codes is not None
    return codes


def _pack_plane(values: jax.Array, width: int) -> jax.Array:
    if width == 8:
        return values
    per_byte = 8 // width
    short = -values.shape[-1] % per_byte
    values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, short)])
    values = values.reshape(*values.shape[:-1], values.shape[-1] // per_byte, per_byte)
    packed = values[..., 0]
    for i in range(1, per_byte):
        packed = packed | (values[..., i] << (width * i))
    return packed


def _unpack_plane(plane: jax.Array, width: int) -> jax.Array:
    if width == 8:
        return plane
    shifts = jnp.arange(0, 8, width, dtype=jnp.uint8)
    values = (plane[..., None] >> shifts.reshape((1,) * plane.ndim + shifts.shape)) & jnp.uint8(2**width - 1)
    return values.reshape(*plane.shape[:-1], plane.shape[-1] * (8 // width))
