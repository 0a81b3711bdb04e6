"""Formats: published tables, thresholds and ties; the AF4 solver against the published levels."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from any4_jax import formats

nearest = jax.jit(formats.nearest, static_argnames="uniform")

# AbnormalFloat for blocks of 64 as published (arXiv 2306.06965).
AF4_64 = (
    -1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0,
    0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0,
)  # fmt: skip
NF4_POSITIVE_THRESHOLDS = (0.039790, 0.120255, 0.203521, 0.292014, 0.389313, 0.501663, 0.642787, 0.861478)
FP4_POSITIVE_THRESHOLDS = (0.002604, 0.0859375, 0.208333, 0.291667, 0.416667, 0.583333, 0.833333)


def table(levels: tuple[float, ...]) -> jnp.ndarray:
    return jnp.asarray([levels], jnp.float32)


def test_nf4_levels() -> None:
    rounded = [-1, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0,
               0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.5626170, 0.72295684, 1]  # fmt: skip
    np.testing.assert_allclose(formats.NF4_LEVELS, rounded, atol=1e-7)


def test_fp4_levels_are_twelfths() -> None:
    np.testing.assert_allclose(12 * np.array(formats.FP4_LEVELS[8:]), [0, 0.0625, 2, 3, 4, 6, 8, 12], rtol=1e-12)
    assert [-v for v in formats.FP4_LEVELS[7::-1]] == list(formats.FP4_LEVELS[8:])


def test_e2m1_levels_are_what_its_bits_say() -> None:
    """Two exponent bits of bias 1, one mantissa bit, subnormals."""
    values = [2.0 ** max(e - 1, 0) * ((e > 0) + m / 2) for e in range(4) for m in range(2)]
    assert list(formats.E2M1_LEVELS[8:]) == values
    assert [-v for v in formats.E2M1_LEVELS[7::-1]] == values


def test_af4_of_64_is_the_published_table() -> None:
    np.testing.assert_allclose(formats.af4_levels(64), AF4_64, rtol=0, atol=1e-6)


@pytest.mark.parametrize("block", [2, 32, 128, 1024])
def test_af4_depends_on_the_block(block: int) -> None:
    levels = np.array(formats.af4_levels(block))
    assert levels[[0, 7, 15]].tolist() == [-1.0, 0.0, 1.0]
    assert (np.diff(levels) > 0).all()
    # The larger the block, the larger its maximum and the closer to zero the bulk of x / max.
    assert np.sign(np.abs(levels[14]) - AF4_64[14]) == np.sign(64 - block)


@pytest.mark.parametrize(
    "levels,thresholds", [(formats.NF4_LEVELS, NF4_POSITIVE_THRESHOLDS), (formats.FP4_LEVELS, FP4_POSITIVE_THRESHOLDS)]
)
def test_codes_change_at_the_published_thresholds(levels, thresholds) -> None:
    at = np.array(thresholds, np.float32)
    above = nearest(jnp.asarray(at[None] + 1e-5), table(levels))[0]
    below = nearest(jnp.asarray(at[None] - 1e-5), table(levels))[0]
    np.testing.assert_array_equal(above - below, np.ones(len(at)))
    first = levels.index(0.0) if levels is formats.NF4_LEVELS else 8
    np.testing.assert_array_equal(above, first + 1 + np.arange(len(at)))


# Halfway values go away from zero.
E2M1_TIES = [(0.25, 0.5), (0.75, 1.0), (1.25, 1.5), (1.75, 2.0), (2.5, 3.0), (3.5, 4.0), (5.0, 6.0), (9.0, 6.0)]


@pytest.mark.parametrize("value,level", E2M1_TIES + [(-v, -q) for v, q in E2M1_TIES])
def test_ties_go_away_from_zero(value: float, level: float) -> None:
    code = int(nearest(jnp.array([[value]]), table(formats.E2M1_LEVELS))[0, 0])
    assert formats.E2M1_LEVELS[code] == level


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_ramp_by_rounding_equals_ramp_by_search(bits: int, rng: np.random.Generator) -> None:
    values = jnp.asarray(rng.normal(0, 2.0 ** (bits - 2), (3, 500)), jnp.float32)
    ramp = formats.integer(bits)
    assert ramp.uniform and ramp.levels == tuple(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    by_search = nearest(values, table(ramp.levels))
    np.testing.assert_array_equal(nearest(values, table(ramp.levels), uniform=True), by_search)


@pytest.mark.parametrize("entries", [16, 64])
def test_nearest_is_nearest(entries: int, rng: np.random.Generator) -> None:
    rows = np.sort(rng.normal(size=(4, entries)), axis=1).astype(np.float32)
    values = rng.normal(size=(4, 300)).astype(np.float32)
    codes = np.asarray(nearest(jnp.asarray(values), jnp.asarray(rows)))
    distance = np.abs(values[:, :, None] - rows[:, None, :])
    np.testing.assert_array_equal(codes, distance.argmin(axis=2))


def test_large_tables_break_ties_as_small_ones_do() -> None:
    levels = formats.float_levels(4, 3)
    middles = (np.array(levels[1:]) + np.array(levels[:-1])) / 2
    codes = np.asarray(nearest(jnp.asarray(middles[None], jnp.float32), table(levels)))[0]
    np.testing.assert_array_equal(codes, np.arange(255) + (middles > 0))
    assert np.asarray(nearest(jnp.asarray([[-1e9, 1e9]]), table(levels))).tolist() == [[0, 255]]


@pytest.mark.parametrize(
    "format_,uniform",
    [(formats.NF4, False), (formats.FP4, False), (formats.mx4("ocp"), False), (formats.learned(4, "none"), False)],
)
def test_only_ramps_are_uniform(format_: formats.Format, uniform: bool) -> None:
    assert format_.uniform is uniform


def test_mx4_rules_by_name() -> None:
    assert (formats.mx4("round").rule, formats.mx4("ocp").rule) == ("e8m0_round", "e8m0_ocp")


@pytest.mark.parametrize("levels,message", [((0.0, 1.0), "got 2 levels for 2 bits"), ((0.0, 2.0, 1.0, 3.0), "ascend")])
def test_a_wrong_table_is_refused(levels, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        formats.Format(bits=2, levels=levels, rule="absmax")


def test_af4_of_one_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="got block_size=1.*larger group_size"):
        formats.af4_levels(1)


# Positive levels at bias 0 (LLM-FP4, arXiv 2310.16836, eq. 1).
FLOATS = {
    (3, 0): (0, 2, 4, 8, 16, 32, 64, 128),
    (2, 1): (0, 1, 2, 3, 4, 6, 8, 12),
    (1, 2): (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5),
}


def test_floats_of_4_bits_are_the_published_grids() -> None:
    assert formats.float_formats(4) == ((1, 2), (2, 1), (3, 0))
    for bits, positive in FLOATS.items():
        levels = formats.float_levels(*bits)
        assert levels[8:] == positive and [-v for v in levels[7::-1]] == list(positive)
        assert len(set(levels)) == 15
        assert formats.Format(bits=4, levels=levels, rule="absmax").uniform is False
    assert tuple(level / 2 for level in formats.float_levels(2, 1)) == formats.E2M1_LEVELS


@pytest.mark.parametrize(
    "bits,dtype,bias",
    [((5, 2), ml_dtypes.float8_e5m2, 15), ((4, 3), ml_dtypes.float8_e4m3fn, 7), ((3, 4), ml_dtypes.float8_e3m4, 3)],
)
def test_floats_of_8_bits_are_those_of_hardware_but_for_infinities(bits, dtype, bias: int) -> None:
    """Where hardware has NaN or infinity, there are the next numbers of the same pattern."""
    assert bits in formats.float_formats(8) and len(formats.float_formats(8)) == 5
    theirs = np.arange(128, dtype=np.uint8).view(dtype).astype(np.float64) * 2.0**bias
    ours, finite = np.array(formats.float_levels(*bits)[128:]), np.isfinite(theirs)
    np.testing.assert_array_equal(ours[finite], theirs[finite])
    assert finite.sum() > 110 and (np.diff(ours) > 0).all()


ALL_FLOATS = formats.float_formats(4) + formats.float_formats(8)
_pairs = jnp.asarray(ALL_FLOATS, jnp.int32)
round_all = jax.jit(jax.vmap(formats.round_to_float, in_axes=(0, 0, 0)))


def by_arithmetic(values: np.ndarray) -> np.ndarray:
    """Values [formats, n] at their nearest levels."""
    return np.asarray(round_all(jnp.asarray(values, jnp.float32), _pairs[:, :1], _pairs[:, 1:]))


def test_rounding_by_arithmetic_finds_the_nearest_level(rng: np.random.Generator) -> None:
    levels = [np.array(formats.float_levels(*bits)) for bits in ALL_FLOATS]
    top = np.array([each[-1] for each in levels])[:, None]
    values = np.float32(top * 2.0 ** rng.uniform(-9, 0.3, (len(levels), 256)) * rng.choice([-1, 1], 256))
    values[:, 0], values[:, 1] = 0, top[:, 0]
    rounded = by_arithmetic(values)
    for grid, ours, x in zip(levels, rounded, values.astype(np.float64), strict=True):
        assert np.isin(ours, grid).all()
        np.testing.assert_array_equal(np.abs(ours - x), np.abs(grid - x[:, None]).min(axis=1))
    np.testing.assert_array_equal(by_arithmetic(rounded), rounded)
    np.testing.assert_array_equal(by_arithmetic(-values), -rounded)
    # One exponent bit is a ramp of 2^M steps below 1 + 1; halfway values take the even multiple.
    halves = np.resize(np.arange(-15, 16) / 4, (len(levels), 31))
    np.testing.assert_array_equal(by_arithmetic(halves)[0], np.clip(np.round(halves[0] * 2), -7, 7) / 2)
    assert by_arithmetic(np.full((len(levels), 1), 2.5))[1, 0] == 2.0
