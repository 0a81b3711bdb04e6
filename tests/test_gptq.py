"""GPTQ: its codes against the published algorithm in float64, and its laws."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_same
from gptq_float64 import gptq
from gptq_layers import ANY3, ANY4, FLOAT_INT, INT, NF, G, H, K, X, layer, levels, output_error, run

from any4_jax import scaling, statistics
from any4_jax.compensation import damped, factor
from any4_jax.methods import GPTQ, MX4, Int, quantize
from any4_jax.weights import PermuteInput, QuantizedTensor, dequantize

# Each pair of a method and a damping compiles a program of its own; so the tests share one damping where they may.


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("inner", [INT, NF, ANY4, ANY3], ids=lambda m: f"{m.name}-{getattr(m, 'bits', 4)}")
def test_codes_are_those_of_the_published_algorithm(inner, act_order) -> None:
    w, q = layer(), run(layer(), GPTQ(inner, act_order=act_order, damping=0.01))
    order = np.argsort(-np.diagonal(H), kind="stable") if act_order else np.arange(K)
    codes, found, loss = gptq(w, H, lambda step: levels(q, order[step] // G), order=order, damping=0.01)
    np.testing.assert_array_equal(q.unpacked_codes(), codes)
    np.testing.assert_allclose(dequantize(q), found, rtol=1e-5, atol=1e-6)
    # What the columns lose one by one is the whole error under the damped Hessian.
    damped = H + 0.01 * np.diagonal(H).mean() * np.eye(K)
    np.testing.assert_allclose(loss, np.einsum("nk,kl,nl->", w - found, damped, w - found), rtol=1e-9)


# Several groups a block, the last one short; a group in several blocks, the last one whole or short.
@pytest.mark.parametrize(("group_size", "act_order"), [(5, True), (5, False), (16, False), (32, True)])
def test_groups_scaled_as_they_come_are_those_of_the_published_algorithm(group_size, act_order) -> None:
    """From weights that hold all corrections so far, also those of the same block; the last group may be short."""
    inner = dataclasses.replace(FLOAT_INT, group_size=group_size)
    w, made = layer(), run(layer(), GPTQ(inner, act_order, static_groups=False, damping=0.01, block=12))
    q = made.inner if act_order else made
    order = np.argsort(-np.diagonal(H), kind="stable") if act_order else np.arange(K)
    now = {}

    def arrive(step, live) -> None:
        if step % group_size == 0:
            one = jnp.asarray(live[:, step : step + group_size], jnp.float32)
            now["levels"] = levels(dataclasses.replace(q, scales=one_scale(one)[0], offsets=one_scale(one)[1]), 0)

    def one_scale(one):
        return scaling.group_scales(one, group_size, rule="asymmetric", bits=4, dtype=jnp.float32)

    _, found, _ = gptq(w, H, lambda step: now["levels"], order=order, damping=0.01, arrive=arrive)
    np.testing.assert_allclose(dequantize(made), found, rtol=1e-4, atol=1e-4)


FALLS = [(inner, {}) for inner in (INT, NF, ANY4, ANY3)]
FALLS += [(inner, {"act_order": False, "static_groups": static}) for inner in (INT, ANY3) for static in (True, False)]


@pytest.mark.parametrize(("inner", "fields"), FALLS, ids=lambda each: getattr(each, "name", None))
def test_the_output_error_falls(inner, fields) -> None:
    w = layer()
    assert output_error(w, run(w, GPTQ(inner, damping=0.01, **fields))) < 0.9 * output_error(w, run(w, inner))


def test_columns_in_order_of_their_energy_lose_less() -> None:
    errors = [output_error(layer(), run(layer(), GPTQ(INT, act_order=on, damping=0.01))) for on in (True, False)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize(
    ("inner", "most"),
    [(ANY3, 0.85), (Int(3, group_size=G), 0.9), (MX4(), 1.0)],
    ids=lambda m: getattr(m, "name", ""),
)
def test_refits_lower_the_output_error(inner, most) -> None:
    """Tables of each row move; fixed ones stay, and so do exponents."""
    plain, refitted = (run(layer(), GPTQ(inner, damping=0.01, refits=refits)) for refits in (0, 4))
    assert output_error(layer(), refitted) < most * output_error(layer(), plain)
    assert np.array_equal(refitted.lut, plain.lut) == (plain.lut.shape[0] == 1)
    assert np.array_equal(refitted.scales, plain.scales) == (plain.scales.dtype == np.uint8)
    for field in ("lut", "scales", "codes"):
        ours, theirs = (getattr(q, field) for q in (refitted, plain))
        assert jnp.asarray(ours[0]).dtype == jnp.asarray(theirs[0]).dtype and np.shape(ours[0]) == np.shape(theirs[0])


def test_groups_in_the_order_of_columns_permute_the_input() -> None:
    as_they_come = GPTQ(INT, static_groups=False, damping=0.01)
    assert isinstance(run(layer(), as_they_come), PermuteInput)
    for fields in ({"static_groups": True}, {"inner": Int(group_size=K)}, {"act_order": False}):
        assert isinstance(run(layer(), dataclasses.replace(as_they_come, **fields)), QuantizedTensor)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("inner", [INT, NF, ANY3], ids=lambda m: m.name)
def test_independent_inputs_are_rounded_to_nearest(inner, act_order) -> None:
    x = np.diag(10.0 ** np.random.default_rng(3).uniform(-2, 2, K)).astype(np.float32)
    assert_same(run(layer(), GPTQ(inner, act_order=act_order, damping=0.01), x), run(layer(), inner, x))


@pytest.mark.parametrize("fields", [{}, {"static_groups": False}], ids=str)
def test_the_block_size_changes_no_code(fields) -> None:
    one, *others = (run(layer(), GPTQ(FLOAT_INT, block=block, **fields)) for block in (128, 1, 7))
    for other in others:
        codes = (getattr(q, "inner", q).unpacked_codes() for q in (one, other))
        np.testing.assert_array_equal(*codes)


def test_the_order_of_the_inputs_changes_nothing_but_their_order() -> None:
    order = np.random.default_rng(1).permutation(K)
    method = GPTQ(dataclasses.replace(FLOAT_INT, group_size=K), damping=0.01)
    straight, permuted = run(layer(), method), run(layer()[:, order], method, X[:, order])
    np.testing.assert_array_equal(permuted.unpacked_codes(), straight.unpacked_codes()[:, order])


def test_tables_and_scales_are_those_of_the_inner_method() -> None:
    q, given = run(layer(), GPTQ(ANY4, damping=0.01)), run(layer(), ANY4)
    assert_same(dataclasses.replace(q, codes=given.codes), given)
    assert not np.array_equal(q.codes, given.codes)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_inputs_that_are_always_zero_are_rounded_to_nearest(damping) -> None:
    """And they leave the others alone, whatever the damping."""
    dead = np.arange(K) % 5 == 2
    x, inner = np.where(dead, 0, X), dataclasses.replace(FLOAT_INT, group_size=K)
    q, nearest = (run(layer(), method, x).unpacked_codes() for method in (GPTQ(inner, damping=damping), inner))
    np.testing.assert_array_equal(q[:, dead], nearest[:, dead])
    assert not np.array_equal(q[:, ~dead], nearest[:, ~dead])
    hessian = np.asarray(H, np.float32) * np.outer(~dead, ~dead)
    alive, straight = np.flatnonzero(~dead), np.arange(K)
    upper = factor(damped(jnp.asarray(hessian), damping), straight).upper[np.ix_(alive, alive)]
    alone = factor(damped(jnp.asarray(hessian[np.ix_(alive, alive)]), damping), np.arange(len(alive))).upper
    np.testing.assert_allclose(upper, alone, atol=1e-5)


def test_the_damping_follows_the_number_of_tokens() -> None:
    """(1 + sqrt(K / T))^2 - 1: with T = K it is 3, and with no end of tokens nothing."""
    for tokens, share in ((K, 3.0), (300, (1 + np.sqrt(K / 300)) ** 2 - 1)):
        x = X[:tokens]
        assert_same(run(layer(), GPTQ(INT), x), run(layer(), GPTQ(INT, damping=float(share)), x))


def test_errors_of_earlier_layers_are_taken_over() -> None:
    """Q x is closer to what W gives for the float model's x, the more of the drift the weights take over."""
    rng, w, inner = np.random.default_rng(2), layer(), Int(8, group_size=G)
    x = (0.9 * X @ (np.eye(K) + 0.05 * rng.normal(size=(K, K)))).astype(np.float32)
    lost = {}
    for share in (0.0, 0.5, 1.0):
        method = GPTQ(inner, damping=1e-4, asymmetric=share)
        gathered = statistics.update(statistics.empty(K, method.needs), jnp.asarray(x), x_float=jnp.asarray(X))
        back = np.asarray(dequantize(quantize(jnp.asarray(w), method, gathered)))
        lost[share] = np.square(X @ w.T - x @ back.T).sum()
    assert lost[1.0] < 0.01 * lost[0.0] and lost[0.5] < 0.3 * lost[0.0]
    assert_same(run(w, GPTQ(INT)), run(w, GPTQ(INT, asymmetric=0.0)))  # x is the float model's own
