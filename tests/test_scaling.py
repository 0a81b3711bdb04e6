"""Scaling: every rule by hand on small groups, rounding to the stored dtype, short and overlong groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax import scaling

group_scales = jax.jit(scaling.group_scales, static_argnums=1, static_argnames=("rule", "bits", "dtype"))
normalize = jax.jit(scaling.normalize, static_argnums=3)

GROUP = np.array([[-1.0, 0.5, 2.0, 0.25]], np.float32)
POSITIVE = np.array([[1.0, 1.5, 2.0, 4.0]], np.float32)

# (weights, rule, bits, scale, offset)
BY_HAND = [
    (GROUP, "asymmetric", 4, 3 / 15, -1 + 8 * 3 / 15),
    (GROUP, "asymmetric", 2, 3 / 3, -1 + 2 * 3 / 3),
    (POSITIVE, "asymmetric", 3, 3 / 7, 1 + 4 * 3 / 7),
    (GROUP, "integer_zero", 4, 3 / 15, (8 - 5) * 3 / 15),
    (POSITIVE, "integer_zero", 4, 4 / 15, 8 * 4 / 15),
    (-POSITIVE, "integer_zero", 4, 4 / 15, (8 - 15) * 4 / 15),
    (GROUP, "symmetric", 4, 2 / 7, None),
    (GROUP, "symmetric", 2, 2.0, None),
    (GROUP, "absmax", 4, 2.0, None),
    (GROUP, "none", 4, 1.0, None),
]


@pytest.mark.parametrize("w,rule,bits,scale,offset", BY_HAND)
def test_rules_by_hand(w, rule, bits, scale, offset) -> None:
    got = group_scales(jnp.asarray(w), 4, rule=rule, bits=bits, dtype=jnp.float32)
    np.testing.assert_allclose(got.scales, [[scale]], rtol=1e-6)
    if offset is None:
        assert got.offsets is None
    else:
        np.testing.assert_allclose(got.offsets, [[offset]], rtol=1e-6)


def test_integers_are_the_nearest_within_their_range() -> None:
    given = jnp.asarray([-1e9, -127.6, -0.5, 0.5, 1.5, 126.4, 128.0, jnp.inf], jnp.float32)
    found = scaling.rounded(given, jnp.dtype(jnp.int8))
    assert found.dtype == jnp.int8 and found.tolist() == [-127, -127, 0, 0, 2, 126, 127, 127]


@pytest.mark.parametrize("rule", ["asymmetric", "symmetric", "absmax"])
def test_normalized_range(rule, rng: np.random.Generator) -> None:
    w = jnp.asarray(rng.normal(size=(5, 96)), jnp.float32)
    scales, offsets = group_scales(w, 32, rule=rule, bits=4, dtype=jnp.float32)
    u = np.asarray(normalize(w, scales, offsets, 32)).reshape(5, 3, 32)
    low, high = {"asymmetric": (-8, 7), "symmetric": (-7, 7), "absmax": (-1, 1)}[rule]
    if rule == "asymmetric":
        np.testing.assert_allclose(u.min(axis=2), low, rtol=1e-5)
        np.testing.assert_allclose(u.max(axis=2), high, rtol=1e-5)
    else:
        np.testing.assert_allclose(np.abs(u).max(axis=2), high, rtol=1e-6)


# (largest magnitude, exponent of the "round" rule, of OCP's floor)
E8M0 = [
    (1.0, -2, -2), (1.49, -2, -2), (1.5, -1, -2), (2.0, -1, -1), (2.99, -1, -1),
    (3.0, 0, -1), (6.0, 1, 0), (7.0, 1, 0), (8.0, 1, 1), (2.0**-20, -22, -22),
]  # fmt: skip


@pytest.mark.parametrize("amax,round_exponent,floor_exponent", E8M0)
def test_e8m0_exponents(amax: float, round_exponent: int, floor_exponent: int) -> None:
    w = jnp.asarray([[amax / 3, -amax, 0.0]], jnp.float32)
    for rule, exponent in (("e8m0_round", round_exponent), ("e8m0_ocp", floor_exponent)):
        scales, offsets = group_scales(w, 32, rule=rule, bits=4, dtype=jnp.uint8)
        assert scales.dtype == jnp.uint8 and offsets is None
        assert int(scales[0, 0]) - 127 == exponent
        assert float(scaling.scale_values(scales)[0, 0]) == 2.0**exponent


def test_e8m0_of_zeros_and_of_the_largest_float() -> None:
    w = jnp.asarray([[0.0], [np.finfo(np.float32).max]], jnp.float32)
    scales, _ = group_scales(w, 1, rule="e8m0_round", bits=4, dtype=jnp.uint8)
    assert scales[:, 0].tolist() == [0, 253]
    assert np.isfinite(scaling.scale_values(scales)).all()
    assert normalize(w, scales, None, 1)[0, 0] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rule", ["asymmetric", "integer_zero", "symmetric", "absmax"])
def test_arithmetic_is_float32_whatever_the_weights(dtype: str, rule, rng: np.random.Generator) -> None:
    w = jnp.asarray(rng.normal(size=(3, 64)), dtype)
    low = group_scales(w, 32, rule=rule, bits=4, dtype=jnp.float32)
    wide = group_scales(w.astype(jnp.float32), 32, rule=rule, bits=4, dtype=jnp.float32)
    np.testing.assert_array_equal(low.scales, wide.scales)
    if low.offsets is not None:
        np.testing.assert_array_equal(low.offsets, wide.offsets)


def test_offset_follows_the_rounded_scale() -> None:
    """The offset is found from the scale as stored, so that the group's minimum stays a level."""
    w = jnp.asarray([[1.0, 1.1, 1.37]], jnp.float32)
    scales, offsets = group_scales(w, 3, rule="asymmetric", bits=4, dtype=jnp.bfloat16)
    stored = np.float32(scales[0, 0])
    assert stored != np.float32(np.float32(1.37 - 1.0) / 15)
    expected = jnp.asarray(np.float32(1.0) + 8 * stored).astype(jnp.bfloat16)
    assert offsets[0, 0] == expected
    zero = group_scales(w, 3, rule="integer_zero", bits=4, dtype=jnp.bfloat16)
    assert float(zero.offsets[0, 0]) == float(jnp.asarray(8 * float(zero.scales[0, 0])).astype(jnp.bfloat16))


@pytest.mark.parametrize("rule", ["asymmetric", "integer_zero", "symmetric", "absmax", "e8m0_round", "none"])
@pytest.mark.parametrize("k,group_size,groups", [(10, 4, 3), (10, 5, 2), (10, 1, 10), (10, 64, 1), (1, 8, 1)])
def test_short_last_group_and_overlong_group(rule, k: int, group_size: int, groups: int, rng) -> None:
    dtype = jnp.uint8 if rule.startswith("e8m0") else jnp.float32
    w = rng.normal(size=(2, k)).astype(np.float32)
    got = group_scales(jnp.asarray(w), group_size, rule=rule, bits=4, dtype=dtype)
    assert got.scales.shape == (2, groups) == (2, scaling.group_count(k, group_size))
    alone = w[:, (groups - 1) * group_size :]
    last = group_scales(jnp.asarray(alone), alone.shape[1], rule=rule, bits=4, dtype=dtype)
    np.testing.assert_array_equal(got.scales[:, -1:], last.scales)
    if got.offsets is not None:
        np.testing.assert_array_equal(got.offsets[:, -1:], last.offsets)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5])
@pytest.mark.parametrize("rule", ["asymmetric", "integer_zero", "symmetric", "absmax"])
def test_constant_groups_stay_finite(rule, value: float) -> None:
    w = jnp.full((2, 8), value)
    scales, offsets = group_scales(w, 4, rule=rule, bits=4, dtype=jnp.bfloat16)
    assert np.isfinite(np.asarray(normalize(w, scales, offsets, 4))).all()
    if rule == "asymmetric" or value == 0:
        # A group without extent is its offset.
        assert not np.asarray(scales, np.float32).any() and not np.asarray(normalize(w, scales, offsets, 4)).any()
        assert offsets is None or (np.asarray(offsets, np.float32) == value).all()
    else:
        assert np.asarray(scales, np.float32).all()


@pytest.mark.parametrize("k", [-110, -60, -20, 20, 60, 120])
@pytest.mark.parametrize("rule", ["asymmetric", "integer_zero", "symmetric", "absmax", "e8m0_round", "e8m0_ocp"])
def test_no_size_of_weights_is_special(rule, k: int, rng: np.random.Generator) -> None:
    w = rng.normal(size=(6, 32)).astype(np.float32)
    w[1, 8:16], w[2] = 0.5, 0
    dtype = jnp.uint8 if rule.startswith("e8m0") else jnp.float32
    near, far = (group_scales(jnp.asarray(v), 8, rule=rule, bits=4, dtype=dtype) for v in (w, w * np.float32(2.0**k)))
    values, moved = (np.asarray(scaling.scale_values(each.scales)) for each in (near, far))
    np.testing.assert_array_equal(moved, values * np.float32(2.0**k))
    if near.offsets is not None:
        np.testing.assert_array_equal(far.offsets, np.asarray(near.offsets) * np.float32(2.0**k))


def test_a_unit_is_a_power_of_two_near_the_largest_weight() -> None:
    largest = [0.0, 1.0, 1.9, -3.0, 2.0**-126, 3e38, 2.0**-20]
    w = jnp.asarray([[x, -x] for x in largest], jnp.float32)
    found = scaling.unit(w, jnp.bfloat16)[:, 0]
    assert found.tolist() == [1.0, 1.0, 1.0, 2.0, 2.0**-126, 2.0**126, 2.0**-20]
    np.testing.assert_array_equal((w / found[:, None]) * found[:, None], w)
    # One for all rows, and none where the dtype has too few exponents to need it.
    assert scaling.unit(w, jnp.float32, axis=None).tolist() == [[2.0**126]]
    assert scaling.unit(w, jnp.float16).tolist() == scaling.unit(w, jnp.uint8).tolist() == [[1.0]] * len(largest)


@pytest.mark.parametrize(
    "dtype,value,unit,expected",
    [
        ("float16", 1.5, 2.0**-14, 1.5 * 2.0**-14), ("float16", 1.5, 2.0**-15, np.nan),
        ("float16", 2.0, 2.0**15, np.inf),
        ("bfloat16", 1.5, 2.0**-126, 1.5 * 2.0**-126), ("bfloat16", 0.5, 2.0**-126, np.nan), ("float32", 0.0, 0.5, 0.0),
        ("bfloat16", 4.0, 2.0**126, np.inf), ("float32", -0.25, 2.0**-125, np.nan),
    ],
)  # fmt: skip
def test_what_a_dtype_can_t_hold_is_marked(dtype: str, value: float, unit: float, expected: float) -> None:
    moved = scaling.in_units(jnp.asarray([value], dtype), jnp.float32(unit))
    assert moved.dtype == dtype
    np.testing.assert_array_equal(np.asarray(moved, np.float32), [np.float32(expected)])
    assert bool(scaling.is_lost(moved)[0]) == np.isnan(expected)


def test_group_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="got group_size=0.*pass a positive"):
        group_scales(jnp.ones((1, 4)), 0, rule="absmax", bits=4, dtype=jnp.float32)
