"""BCQ: the laws of alternating least squares on binary planes, and the weights that they are stored as."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import any4_jax as a4
from any4_jax.methods import BCQ, Int
from any4_jax.methods.binary_coding import greedy, nearest, refine
from any4_jax.weights import Sum

ROUNDS = 8


@functools.cache
def groups() -> np.ndarray:
    """Heavy-tailed groups [R, g]; one constant, one of zeros, one of two magnitudes, so that planes agree."""
    w = np.random.default_rng(3).standard_t(4, (24, 40)).astype(np.float32)
    w[3], w[4], w[5] = 0.75, 0, np.where(w[5] > 0, 2.0, -0.5)
    return w


@functools.cache
def history(planes: int, offset: bool):
    """The coding of the groups before the first round and after each, and the patterns that are nearest for it."""
    w, h = jnp.asarray(groups()), jnp.ones_like(groups())

    @jax.jit
    def step(coding):
        return nearest(w, coding), refine(w, h, coding, offset=offset)

    coding, found = jax.jit(lambda: greedy(w, h, planes, offset=offset))(), []
    for _ in range(ROUNDS + 1):
        patterns, following = step(coding)
        found.append((coding, np.asarray(patterns)))
        coding = following
    return found


def levels(coding) -> np.ndarray:
    """The levels [R, 2^q] in float64, by pattern."""
    scales = np.asarray(coding.scales, np.float64)
    signs = np.array(
        [[1 if pattern >> i & 1 else -1 for i in range(scales.shape[1])] for pattern in range(2 ** scales.shape[1])]
    )
    return scales @ signs.T + np.asarray(coding.offset, np.float64)[:, None]


@pytest.mark.parametrize("planes,offset", [(3, False), (2, True)])
def test_rounds_never_raise_the_error_and_end_at_the_nearest_levels(planes: int, offset: bool) -> None:
    w, errors = groups(), []
    for coding, patterns in history(planes, offset):
        by_pattern = levels(coding)
        distance = np.abs(np.take_along_axis(by_pattern, patterns, axis=1) - w)
        np.testing.assert_allclose(distance, np.abs(by_pattern[:, None] - w[:, :, None]).min(axis=2), atol=1e-6)
        scales = np.asarray(coding.scales)
        assert (scales >= 0).all() and (np.diff(scales, axis=1) <= 0).all()
        errors.append((distance**2).sum(axis=1))
    slack = 1e-6 * (w**2).sum(axis=1)
    assert (np.diff(errors, axis=0) <= slack).all()
    assert errors[-1].sum() < 0.8 * errors[0].sum()
    # What the planes can hold, they do: a constant, zeros, and two values.
    assert (errors[-1][3:6] <= slack[3:6]).all()


def test_a_round_solves_for_the_scales_of_its_signs() -> None:
    """The first round's scales are numpy's least-squares solution for the signs before it."""
    (_, patterns), (coding, _) = history(3, False)[:2]
    for row, pattern, scales in list(zip(groups(), patterns, np.asarray(coding.scales), strict=True))[6:]:
        signs = np.stack([np.where(pattern >> i & 1, 1.0, -1.0) for i in range(3)], axis=1)
        solved = np.linalg.lstsq(signs, row.astype(np.float64), rcond=None)[0]
        np.testing.assert_allclose(scales, -np.sort(-np.abs(solved)), rtol=1e-4, atol=1e-5)


def test_one_plane_is_the_sign_and_the_mean_magnitude() -> None:
    w = groups()
    q = a4.quantize(jnp.asarray(w), BCQ(bits=1, group_size=20, scale_dtype="float32"))
    mean = np.abs(w.reshape(24, 2, 20)).mean(axis=2)
    np.testing.assert_allclose(np.asarray(q.terms[0].scales), mean, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(q.terms[0].unpacked_codes()), w >= 0)


def test_what_is_stored_is_a_sum_of_signs_at_the_nearest_level() -> None:
    """Packed equals simulated: sum_i a_i b_i from the stored arrays, every weight at its nearest level of these."""
    w = groups()
    q = a4.quantize(jnp.asarray(w), BCQ(bits=2, group_size=16, offset=True))
    assert isinstance(q, Sum) and [term.bits for term in q.terms] == [1, 1]
    assert [term.offsets is None for term in q.terms] == [False, True]
    of_group = np.arange(40) // 16
    scales = [np.asarray(term.scales, np.float32)[:, of_group] for term in q.terms]
    offset = np.asarray(q.terms[0].offsets, np.float32)[:, of_group]
    signs = [np.asarray(term.unpacked_codes(), np.float32) * 2 - 1 for term in q.terms]
    dense = np.asarray(a4.dequantize(q))
    np.testing.assert_allclose(dense, signs[0] * scales[0] + signs[1] * scales[1] + offset, rtol=1e-6, atol=1e-6)
    every = np.stack([a * scales[0] + b * scales[1] + offset for a in (-1, 1) for b in (-1, 1)])
    np.testing.assert_allclose(np.abs(dense - w), np.abs(every - w).min(axis=0), atol=1e-6)
    assert q.bits_per_weight == 8 * (2 * 24 * (5 + 6) + 24 * 6 + 2 * 4) / w.size


def test_planes_offsets_rounds_and_weights_lower_the_error() -> None:
    """Beside integers, binary planes are better with few bits; weighted by E[x^2] they lower the output's error."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(16, 256)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(256, 256)) * 10.0 ** rng.uniform(-1, 1, 256), jnp.float32)
    stats = a4.statistics.from_activations(x)

    def error(method, weight=1.0):
        return float((((a4.dequantize(a4.quantize(w, method, stats)) - w) ** 2) * weight).sum())

    two, second = BCQ(bits=2), (x**2).mean(axis=0)
    assert error(BCQ(bits=3)) < error(two) < 0.6 * error(Int(bits=2))
    assert error(BCQ(bits=2, offset=True)) < error(two) < error(BCQ(bits=2, rounds=0))
    assert error(BCQ(bits=2, sample_weight="second_moment"), second) < 0.95 * error(two, second)


def test_a_weight_by_name_needs_statistics() -> None:
    with pytest.raises(ValueError, match="got sample_weight='second_moment' without statistics.*pass stats"):
        a4.quantize(jnp.ones((2, 8)), BCQ(sample_weight="second_moment"))
