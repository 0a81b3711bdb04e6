"""GPTQ in use: what it refuses, inside other methods, over experts, in walks, checkpoints and flags."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_same
from flax import nnx
from gptq_layers import ANY4, INT, NF, G, K, X, layer, output_error, run
from toy_methods import EvenInputs, Nested

from any4_jax import statistics
from any4_jax.checkpoint import load, save
from any4_jax.cli.methods import add_method, method_from
from any4_jax.methods import GPTQ, NF4, Any4, Int, Result, matrices, quantize
from any4_jax.models.tiny import random_llama
from any4_jax.statistics import Hessian
from any4_jax.surgery import quantized_leaves
from any4_jax.walk import quantize_model
from any4_jax.weights import PermuteInput, Sum

TOKENS = np.random.default_rng(0).integers(0, 128, (3, 12), dtype=np.int32)

FEW = r"the Hessian of 20 tokens with damping=0.0 is not positive definite, K=48 inputs need at least 48 tokens"


@pytest.mark.parametrize("method", [GPTQ(INT, damping=0.0), GPTQ(ANY4, False, damping=0.0)], ids=["int", "any4"])
def test_too_few_tokens_without_damping_are_refused(method) -> None:
    with pytest.raises(ValueError, match=f"the weight: {FEW}"):
        run(layer(), method, X[:20])
    run(layer(), dataclasses.replace(method, damping=0.01), X[:20])


def test_too_few_tokens_are_refused_inside_other_methods() -> None:
    """A method that passes the result on tells what it is told; one that takes it apart finds no finite scale."""
    model, inner = random_llama(), GPTQ(Int(8, group_size=G), damping=0.0, asymmetric=0.0)
    words = r"layers\.0.*: the Hessian of 36 tokens with damping=0.0 is not positive definite, K=(48|88) "
    with pytest.raises(ValueError, match=words):
        quantize_model(model, Whole(inner), data=TOKENS)
    with pytest.raises(ValueError, match=r"layers\.0\..*: its scales would be too small"):
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


@dataclasses.dataclass(frozen=True)
class CodedScales(Nested):
    """Gives a matrix whose scales are coded themselves."""

    def apply(self, w, gathered):
        made = self.inner.apply(w, gathered).operator
        scales = Int(8, group_size=8).apply(made.scales.astype(jnp.float32), None).operator
        return Result(dataclasses.replace(made, scales=scales))


def test_coded_scales_stay_as_they_are() -> None:
    w = jnp.asarray(layer())
    q, given = run(w, GPTQ(CodedScales(NF))), run(w, CodedScales(NF))
    assert_same(q.scales, given.scales)
    assert output_error(w, q) < output_error(w, given)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (GPTQ(Two()), "got inner=toy-nested, which gives a Sum, .* pass a method that gives one"),
        (GPTQ(CodedScales(), refits=1), "with toy-nested, whose scales or offsets are coded .* pass refits=0"),
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
    """Its linears have one shape: a method is compiled once, rather than once a shape."""
    return random_llama(dataclasses.replace(random_llama().config, intermediate_size=48, num_key_value_heads=6))


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
