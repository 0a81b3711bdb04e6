"""GPTQ: its codes against the published algorithm in float64, its laws, its use by walks, checkpoints and flags."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_same
from flax import nnx
from gptq_float64 import gptq
from toy_methods import EvenInputs, Nested

from any4_jax import scaling, statistics
from any4_jax.checkpoint import load, save
from any4_jax.cli.methods import add_method, method_from
from any4_jax.methods import GPTQ, MX4, NF4, Any4, Int, Result, matrices, quantize
from any4_jax.methods.compensation import factor
from any4_jax.models.tiny import random_llama
from any4_jax.statistics import Hessian
from any4_jax.surgery import quantized_leaves
from any4_jax.walk import quantize_model
from any4_jax.weights import PermuteInput, QuantizedTensor, Sum, dequantize

N, K, G = 12, 48, 16
TOKENS = np.random.default_rng(0).integers(0, 128, (3, 12), dtype=np.int32)
INT, NF, ANY4, ANY3 = Int(group_size=G), NF4(group_size=G), Any4(group_size=G), Any4(bits=3, group_size=G)
FLOAT_INT = Int(group_size=G, zero_point="float", scale_dtype="float32", table_dtype="float32")


def layer(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(4, (N, K)).astype(np.float32)


def activations(tokens: int = 300, k: int = K) -> np.ndarray:
    """Inputs [T, K] that depend on each other, of different sizes."""
    rng = np.random.default_rng(7)
    mixed = rng.normal(size=(tokens, k)) @ (np.eye(k) + rng.normal(size=(k, k)) / np.sqrt(k))
    return (mixed * 10.0 ** rng.uniform(-0.5, 0.5, k)).astype(np.float32)


X = activations()
H = np.asarray(statistics.from_activations(X, statistics=[Hessian()])[Hessian()].mean, np.float64)


def run(w, method, x=X):
    gathered = statistics.from_activations(x, statistics=dict.fromkeys((*method.needs, Hessian())))
    return quantize(jnp.asarray(w), method, gathered)


def output_error(w, q) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    gap = np.asarray(w, np.float64) - np.asarray(dequantize(q), np.float64)
    return float(np.einsum("nk,kl,nl->", gap, H, gap))


def levels(q: QuantizedTensor, group: int) -> np.ndarray:
    """The values [N, E] that a group's weights may take."""
    table = np.broadcast_to(np.asarray(q.lut, np.float64), (N, q.lut.shape[1]))
    offset = 0.0 if q.offsets is None else np.asarray(q.offsets, np.float64)[:, group, None]
    return table * np.asarray(q.scales, np.float64)[:, group, None] + offset


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


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [5, 16, 32])
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


FALLS = [(inner, {}) for inner in (Int(3, group_size=G), NF, ANY4, ANY3)]
FALLS += [(inner, {"act_order": False, "static_groups": static}) for inner in (INT, ANY3) for static in (True, False)]


@pytest.mark.parametrize(("inner", "fields"), FALLS, ids=lambda each: getattr(each, "name", None))
def test_the_output_error_falls(inner, fields) -> None:
    w = layer()
    assert output_error(w, run(w, GPTQ(inner, damping=0.01, **fields))) < 0.9 * output_error(w, run(w, inner))


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
    assert jax.tree.map(jnp.shape, refitted) == jax.tree.map(jnp.shape, plain)
    assert jax.tree.map(jnp.result_type, refitted) == jax.tree.map(jnp.result_type, plain)


def test_columns_in_order_of_their_energy_lose_less() -> None:
    errors = [output_error(layer(), run(layer(), GPTQ(INT, act_order=on, damping=0.01))) for on in (True, False)]
    assert errors[0] < 0.9 * errors[1]


def test_groups_in_the_order_of_columns_permute_the_input() -> None:
    assert isinstance(run(layer(), GPTQ(INT, static_groups=False)), PermuteInput)
    for method in (GPTQ(INT), GPTQ(Int(group_size=K), static_groups=False), GPTQ(INT, False, False)):
        assert isinstance(run(layer(), method), QuantizedTensor)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("inner", [INT, NF, ANY3], ids=lambda m: m.name)
def test_independent_inputs_are_rounded_to_nearest(inner, act_order) -> None:
    x = np.diag(10.0 ** np.random.default_rng(3).uniform(-2, 2, K)).astype(np.float32)
    assert_same(run(layer(), GPTQ(inner, act_order=act_order, block=7), x), run(layer(), inner, x))


@pytest.mark.parametrize("fields", [{}, {"act_order": False}, {"static_groups": False}], ids=str)
def test_the_block_size_changes_no_code(fields) -> None:
    one, *others = (run(layer(), GPTQ(FLOAT_INT, block=block, **fields)) for block in (128, 1, 7))
    for other in others:
        codes = (getattr(q, "inner", q).unpacked_codes() for q in (one, other))
        np.testing.assert_array_equal(*codes)


def test_the_order_of_the_inputs_changes_nothing_but_their_order() -> None:
    order = np.random.default_rng(1).permutation(K)
    method = GPTQ(dataclasses.replace(FLOAT_INT, group_size=K))
    straight, permuted = run(layer(), method), run(layer()[:, order], method, X[:, order])
    np.testing.assert_array_equal(permuted.unpacked_codes(), straight.unpacked_codes()[:, order])


def test_tables_and_scales_are_those_of_the_inner_method() -> None:
    q, given = run(layer(), GPTQ(ANY4)), run(layer(), ANY4)
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
    upper = factor(jnp.asarray(hessian), straight, damping).upper[np.ix_(alive, alive)]
    alone = factor(jnp.asarray(hessian[np.ix_(alive, alive)]), np.arange(len(alive)), damping).upper
    np.testing.assert_allclose(upper, alone, atol=1e-5)


def test_the_damping_follows_the_number_of_tokens() -> None:
    """(1 + sqrt(K / T))^2 - 1: with T = K it is 3, and with no end of tokens nothing."""
    for tokens, share in ((K, 3.0), (4 * K, 1.25), (300, (1 + np.sqrt(K / 300)) ** 2 - 1)):
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
    assert_same(run(w, GPTQ(inner)), run(w, GPTQ(inner, asymmetric=0.0)))  # x is the float model's own


FEW = r"the Hessian of 20 tokens with damping=0.0 is not positive definite, K=48 inputs need at least 48 tokens"


@pytest.mark.parametrize("method", [GPTQ(INT, damping=0.0), GPTQ(ANY4, False, damping=0.0)], ids=["int", "any4"])
def test_too_few_tokens_without_damping_are_refused(method) -> None:
    with pytest.raises(ValueError, match=f"the weight: {FEW}"):
        run(layer(), method, X[:20])
    run(layer(), dataclasses.replace(method, damping=0.01), X[:20])


def test_too_few_tokens_are_refused_inside_other_methods() -> None:
    """A method that passes the result on tells what it is told; one that takes it apart finds no finite table."""
    model, inner = random_llama(), GPTQ(Int(8, group_size=G), damping=0.0, asymmetric=0.0)
    words = r"layers\.0.*: the Hessian of 36 tokens with damping=0.0 is not positive definite, K=(48|88) "
    with pytest.raises(ValueError, match=words):
        quantize_model(model, Whole(inner), data=TOKENS)
    with pytest.raises(ValueError, match=r"layers\.0\..*: its table would be too small"):
        quantize_model(model, Nested(inner), data=TOKENS)


class Whole(EvenInputs):
    """Passes on what the inner method says."""

    name = "toy-whole"
    needs = (Hessian(), *EvenInputs.needs)

    def apply(self, site, gathered):
        made = super().apply(site, gathered)
        scaled = gathered.scaled(made.input_scale)
        return dataclasses.replace(
            made, results={path: self.inner.apply(w / made.input_scale, scaled) for path, w in site.weights.items()}
        )


@dataclasses.dataclass(frozen=True)
class Two(Nested):
    """Gives a sum of two matrices."""

    def apply(self, w, gathered):
        made = self.inner.apply(w, gathered)
        return Result(Sum((made.operator, made.operator)))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (GPTQ(Two()), "got inner=toy-nested, which gives a Sum, .* pass a method that gives one"),
        (GPTQ(INT, static_groups=False, refits=4), "got refits=4 with static_groups=False, .* pass static_groups=True"),
        (GPTQ(Nested(), static_groups=False), "got static_groups=False with toy-nested, which has no scale_groups"),
    ],
)
def test_what_cant_be_inside_is_refused(method, words) -> None:
    with pytest.raises(ValueError, match=words):
        run(layer(), method)


@pytest.mark.parametrize(
    "fields", [{"damping": -1.0}, {"damping": float("nan")}, {"block": 0}, {"asymmetric": 1.5}, {"inner": 4}], ids=str
)
def test_fields_that_make_no_sense_are_refused(fields) -> None:
    with pytest.raises(ValueError, match=f"got {next(iter(fields))}=.* for GPTQ, need "):
        GPTQ(**fields)


def test_it_needs_statistics() -> None:
    with pytest.raises(ValueError, match="got no statistics, gptq needs the Hessian"):
        quantize(jnp.asarray(layer()), GPTQ())


def test_any_method_of_one_coded_matrix_may_be_inside() -> None:
    assert_same(run(layer(), GPTQ(Nested(INT))), run(layer(), GPTQ(INT)))
    result = GPTQ(Nested(ANY4)).apply(jnp.asarray(layer()), statistics.from_activations(X, statistics=GPTQ(ANY4).needs))
    assert result.notes["searched"] is True, "the inner method's notes are kept"


def test_experts_without_tokens_are_rounded_to_nearest() -> None:
    stack = jnp.asarray(np.stack([layer(0).T, layer(1).T]))
    routed = np.stack([np.ones(len(X), bool), np.zeros(len(X), bool)])
    method = GPTQ(INT)
    seen = statistics.update(statistics.empty(K, method.needs, experts=2), X, None, jnp.asarray(routed))
    made = matrices.quantize_matrix(matrices.Matrix(stack, transposed=True), method, seen, "experts").operator
    first, second = (jax.tree.map(lambda a, i=i: a[i], made) for i in range(2))
    assert_same(first, run(layer(0), method))
    assert_same(second, run(layer(1), INT))


@pytest.fixture(scope="module")
def model():
    return random_llama()


def test_a_walk_compensates_on_quantized_inputs(model, tmp_path) -> None:
    """By site, so that each Hessian is of the model as quantized so far; and what a checkpoint holds comes back."""
    data = np.random.default_rng(3).integers(0, 128, (8, 24), dtype=np.int32)
    inner = Int(3, group_size=G)

    def error(method) -> float:
        return float(np.square(np.asarray(quantized[method](data)) - np.asarray(model(data))).mean())

    sequential, offline = GPTQ(inner), GPTQ(inner, sequential=False)
    quantized = {method: quantize_model(model, method, data=data) for method in (inner, sequential, offline)}
    assert error(sequential) < 0.8 * error(inner) and error(offline) < 0.8 * error(inner)
    first, second = (quantized_leaves(quantized[m])["layers.1.mlp.down_proj"].codes for m in (sequential, offline))
    assert not np.array_equal(first[0], second[0])
    save(tmp_path / "ckpt", quantized[sequential])
    again = load(tmp_path / "ckpt")
    assert_same(nnx.state(again), nnx.state(quantized[sequential]))
    assert again.recipe == quantized[sequential].recipe
    assert {method for _, method, _ in again.recipe.linears} == {sequential}


def test_permuted_groups_come_back_from_a_checkpoint(model, tmp_path) -> None:
    made = quantize_model(model, GPTQ(NF, static_groups=False), data=TOKENS, rules=[(r".*(q|k|v|gate|up)_proj", None)])
    save(tmp_path / "ckpt", made)
    again = load(tmp_path / "ckpt")
    np.testing.assert_array_equal(again(TOKENS), made(TOKENS))
    assert all(isinstance(w, PermuteInput) for w in quantized_leaves(again).values())


@pytest.mark.parametrize(
    ("flags", "method"),
    [
        ([], GPTQ()),
        (["--inner", "any4", "--inner-bits", "3"], GPTQ(Any4(bits=3))),
        (["--inner", "nf4", "--inner-group-size", "64", "--no-act-order"], GPTQ(NF4(group_size=64), act_order=False)),
        (
            ["--no-static-groups", "--damping", "0.05", "--block", "64"],
            GPTQ(static_groups=False, damping=0.05, block=64),
        ),
    ],
    ids=str,
)
def test_the_command_has_a_flag_for_each_field(flags, method) -> None:
    argv = ["quantize", "tiny", "out", "--method", "gptq", *flags]
    parser = argparse.ArgumentParser()
    add_method(parser, argv)
    assert method_from(parser.parse_args(argv[3:])) == method
