"""Packing: the frozen byte order of every width, and what is refused."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax import packing

GOLDEN = np.load(Path(__file__).parent / "golden" / "packing.npz")
CASES = [tuple(map(int, name.split("_")[1:])) for name in GOLDEN.files if name.startswith("codes")]


def golden(bits: int, length: int) -> tuple[np.ndarray, list[np.ndarray]]:
    planes = [GOLDEN[f"plane_{bits}_{length}_{i}"] for i in range(len(packing.PLANES[bits]))]
    return GOLDEN[f"codes_{bits}_{length}"], planes


def test_golden_file_covers_every_width() -> None:
    assert {bits for bits, _ in CASES} == set(packing.PLANES)
    assert {length % 8 for _, length in CASES} >= {0, 1, 2, 3, 7}


@functools.partial(jax.jit, static_argnums=(2, 3))
def both_ways(codes: jax.Array, planes: packing.Planes, bits: int, length: int) -> tuple[packing.Planes, jax.Array]:
    return packing.pack(codes, bits), packing.unpack(planes, bits, length)


@pytest.mark.parametrize("bits,length", CASES)
def test_bytes_are_the_frozen_ones(bits: int, length: int) -> None:
    codes, expected = golden(bits, length)
    packed, unpacked = both_ways(codes, tuple(expected) if len(expected) > 1 else expected[0], bits, length)
    planes = packed if isinstance(packed, tuple) else (packed,)
    assert isinstance(packed, tuple) == (len(expected) > 1)
    for plane, bytes_ in zip(planes, expected, strict=True):
        assert plane.dtype == jnp.uint8
        np.testing.assert_array_equal(plane, bytes_)
    np.testing.assert_array_equal(unpacked, codes)
    assert expected[0].shape[-1] * 8 // packing.PLANES[bits][0] - packing.padding(length, bits) == length


def test_two_codes_by_hand() -> None:
    """Code 0 sits in the low nibble; a 3-bit code gives its low two bits to the first plane."""
    np.testing.assert_array_equal(packing.pack(jnp.array([0x3, 0xA], jnp.uint8), 4), [0xA3])
    low, high = packing.pack(jnp.array([0b101, 0b010], jnp.uint8), 3)
    np.testing.assert_array_equal(low, [0b1001])
    np.testing.assert_array_equal(high, [0b01])


@pytest.mark.parametrize("bits", packing.PLANES)
def test_stored_bits_are_the_claimed_bits(bits: int) -> None:
    planes = jax.tree.leaves(packing.pack(jnp.zeros((2, 64), jnp.uint8), bits))
    assert sum(plane.size * 8 for plane in planes) == bits * 2 * 64


def test_leading_axes(rng: np.random.Generator) -> None:
    codes = rng.integers(0, 32, (2, 3, 5, 11), dtype=np.uint8)
    packed = packing.pack(codes, 5)
    assert [plane.shape for plane in packed] == [(2, 3, 5, 6), (2, 3, 5, 2)]
    np.testing.assert_array_equal(packing.unpack(packed, 5, 11), codes)
    np.testing.assert_array_equal(packed[0][1, 2], packing.pack(jnp.asarray(codes[1, 2]), 5)[0])


@pytest.mark.parametrize("bits", [0, 7, 9])
def test_width_without_planes_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"got bits={bits}.*choose"):
        packing.pack(jnp.zeros(4, jnp.uint8), bits)


def test_wider_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="got codes of dtype int32, need uint8"):
        packing.pack(jnp.zeros(4, jnp.int32), 4)
