"""The walk: how often a block runs, what is held, methods of every scope, experts."""

import dataclasses
import gc
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_same
from flax import nnx
from toy_methods import EvenInputs, FitNorms, Nested

from any4_jax.methods import AWQ, GPTQ, NF4, Any4, Int, matrices, on_block, on_site
from any4_jax.methods.base import SiteWeights
from any4_jax.models.tiny import random_llama
from any4_jax.statistics import Drift, Gathered
from any4_jax.surgery import explain, quantized_leaves
from any4_jax.walk import calibrate, quantize_model
from any4_jax.weights import ScaleInput, dequantize

NF = NF4(group_size=16)


class FoldedInputs(EvenInputs):
    """Sequential, and with statistics of float blocks, so that every scale is folded."""

    order = "at_once"


ANY4 = Any4(group_size=16, refit=False)
SEQUENTIAL = Nested(inner=Int(4, group_size=16))
TOKENS = np.random.default_rng(0).integers(0, 128, (3, 12), dtype=np.int32)


@pytest.fixture(scope="module")
def model():
    """Its linears have one shape: a method is compiled once, rather than once a shape."""
    return random_llama(dataclasses.replace(random_llama().config, intermediate_size=48, num_key_value_heads=6))


def test_a_block_runs_once_where_nothing_is_sequential(model, runs) -> None:
    quantize_model(model, Nested(Int(4, group_size=16), by_site=False), data=TOKENS, batch_size=2)
    assert runs == {("layers.0", True): 2, ("layers.1", True): 2}
    runs.clear()
    calibrate(model, TOKENS)
    assert runs == {("layers.0", True): 1, ("layers.1", True): 1}
    runs.clear()
    quantize_model(model, NF)
    assert not runs


def test_a_sequential_block_runs_once_and_up_to_each_site(model, runs, monkeypatch) -> None:
    """Four captures that end at their site, and one run for what the next block gets; each linear is quantized once."""
    quantized: Counter = Counter()
    real = matrices.quantize_matrix
    monkeypatch.setattr(matrices, "quantize_matrix", lambda *job: quantized.update([job[3]]) or real(*job))
    quantize_model(model, SEQUENTIAL, data=TOKENS)
    assert runs == {(f"layers.{i}", outputs): 1 if outputs else 4 for i in range(2) for outputs in (False, True)}
    assert len(quantized) == 14 and set(quantized.values()) == {1}


def test_targets_cost_one_run_of_the_float_block(model, runs) -> None:
    """However often a method asks for them; where nothing is sequential they are what the next block gets."""
    quantize_model(model, FitNorms(Int(3, group_size=16), steps=1), data=TOKENS)
    assert runs == {("layers.0", True): 2, ("layers.1", True): 2}
    runs.clear()
    method = type("Offline", (FitNorms,), {"sequential": False})(Nested(NF, by_site=False), 1)
    quantize_model(model, method, data=TOKENS, rules=[(r".*q_proj", NF)])
    assert runs == {("layers.0", True): 1, ("layers.1", True): 1}


def test_a_lifted_method_is_the_method_whatever_another_rule_quantizes_before_it(model) -> None:
    rules = [(r".*(q|k|v)_proj", Int(2, group_size=16))]
    plain, lifted = (
        quantize_model(model, method, data=TOKENS, rules=rules)
        for method in (Nested(NF, by_site=False), on_block(Nested(NF, by_site=False)))
    )
    assert plain.recipe.linears == lifted.recipe.linears


def test_no_block_runs_where_no_method_needs_statistics(model, runs) -> None:
    quantize_model(model, NF, data=TOKENS)
    assert not runs


def test_a_capture_does_not_compute_what_comes_after_its_site(model) -> None:
    """XLA drops the MLP and the attention's products where only the first site is looked at."""
    block = model.blocks[0]
    x = jnp.ones((1, 12, 48))
    cache = jax.tree.map(jnp.asarray, model.init_cache(1, 12)[0])

    def flops(name: str, outputs: bool) -> float:
        from any4_jax import statistics
        from any4_jax.walk.capture import run_block

        seen = {name: statistics.empty(48, statistics.DEFAULT)}
        arguments = (type(model).block, *nnx.split(block), x, cache, jnp.ones((1, 12), bool), seen, outputs)
        return run_block.lower(*arguments).compile().cost_analysis()["flops"]

    assert flops("attn_in", False) < 0.2 * flops("attn_in", True)


def test_statistics_of_pairs_compare_with_the_float_model(model) -> None:
    """E[(x_float - x) x^T] of each site, where x is of the model as quantized so far."""
    method = GPTQ(Int(2, group_size=16))
    stats = calibrate(model, TOKENS, method)
    quantized = quantize_model(model, method, data=TOKENS)

    def first_site(decoder) -> np.ndarray:
        """What enters the second block's q, k and v."""

        @nnx.jit  # op by op, each shape compiles
        def run(decoder) -> jax.Array:
            seen = {}
            positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1], dtype=jnp.int32), TOKENS.shape)
            x = decoder.embed(TOKENS, positions)
            for index, block in enumerate(decoder.blocks[:2]):
                cache = decoder.init_cache(*TOKENS.shape)[index]
                x, _ = type(decoder).block(
                    *nnx.split(block), x, cache, positions, lambda name, value: seen.update({name: value})
                )
            return seen["attn_in"]

        return np.asarray(run(decoder), np.float64).reshape(-1, 48)

    x_float, x = first_site(model), first_site(quantized)
    found = stats["layers.1.self_attn.q_proj"][Drift()].mean
    np.testing.assert_allclose(found, (x_float - x).T @ x / len(x), rtol=1e-3, atol=1e-5)
    assert not np.asarray(stats["layers.0.self_attn.q_proj"][Drift()].mean).any()
    assert np.abs(stats["lm_head"][Drift()].mean).max() > 1e-3
    assert Drift() not in dataclasses.replace(method, sequential=False).needs


def test_statistics_die_with_their_block(model, monkeypatch) -> None:
    """No more than the four sites of one block are held, and an accumulator that is being replaced."""
    held = []
    real = matrices.quantize_matrix

    def counting(*job):
        gc.collect()
        held.append(sum(type(one) is Gathered for one in gc.get_objects()))
        return real(*job)

    monkeypatch.setattr(matrices, "quantize_matrix", counting)
    gc.collect()
    before = sum(type(one) is Gathered for one in gc.get_objects())
    quantize_model(model, Nested(Int(4, group_size=16), by_site=False), data=TOKENS)
    assert max(held) - before <= 8, held


def test_notes_and_nested_methods_are_recorded(model) -> None:
    new = quantize_model(model, SEQUENTIAL, data=TOKENS, rules=[(r".*down_proj", NF)])
    linears = {path: (method, dict(notes)) for path, method, notes in new.recipe.linears}
    method, notes = linears["layers.1.self_attn.q_proj"]
    assert method == SEQUENTIAL and notes["searched"] is True and isinstance(notes["energy"], float)
    assert notes["energy"] > 0 and linears["layers.0.mlp.down_proj"] == (NF, {})


def outputs(model) -> np.ndarray:
    return np.asarray(model(TOKENS))


def kept_scales(model) -> set[str]:
    """Linears, by their paths in a block, whose input scale is still an operator."""
    return {path.split(".", 2)[2] for path, w in quantized_leaves(model).items() if isinstance(w, ScaleInput)}


def test_a_site_methods_scale_is_folded_or_kept(model) -> None:
    """With 8 bits the function hardly changes, though the inputs of every linear are scaled."""
    method = EvenInputs(Int(8, group_size=16))
    folded = quantize_model(model, method, data=TOKENS)
    kept = quantize_model(model, dataclasses.replace(method, by_site=True), data=TOKENS)
    for new in (folded, kept):
        assert np.abs(outputs(new) - outputs(model)).max() < 0.03 * np.abs(outputs(model)).max()
        norms = (one.blocks[0].input_layernorm.scale[...] for one in (new, model))
        assert not np.isclose(*norms, rtol=0.05).any()
        assert len(quantized_leaves(new)) == 14
        assert all(dict(notes)["largest"] > 0 for _, _, notes in new.recipe.linears)
    assert kept_scales(folded) == set()
    # Site by site, v_proj and up_proj are quantized when the sites that they feed come.
    assert kept_scales(kept) == {"self_attn.o_proj", "mlp.down_proj"}
    at_once = quantize_model(model, FoldedInputs(method.inner, by_site=True), data=TOKENS)
    assert kept_scales(at_once) == set()
    told = [
        {path.removeprefix("layers.0."): dict(notes)["input_scale"] for path, _, notes in new.recipe.linears}
        for new in (folded, kept, at_once)
    ]
    assert told[0] == told[2] and told[0]["mlp.down_proj"] == "folded into mlp.up_proj"
    assert told[0]["self_attn.k_proj"] == told[1]["self_attn.k_proj"] == "folded into input_layernorm"
    assert told[1]["mlp.down_proj"] == "kept, mlp.up_proj can't hold it"
    assert "scale of the inputs: kept, mlp.up_proj can't hold it" in explain(kept, platform="cpu")


def test_a_scale_of_one_is_not_kept(model) -> None:
    class Unscaled(EvenInputs):
        def apply(self, site, gathered):
            made = super().apply(site, None)
            return dataclasses.replace(made, input_scale=jnp.ones_like(made.input_scale))

    new = quantize_model(model, Unscaled(NF, by_site=True), data=TOKENS)
    assert kept_scales(new) == set() and not any("input_scale" in dict(notes) for _, _, notes in new.recipe.linears)


def test_linears_that_a_rule_leaves_float_are_divided_where_their_input_is_scaled(model) -> None:
    new = quantize_model(model, EvenInputs(Int(8, group_size=16)), data=TOKENS, rules=[(r".*(q_proj|gate_proj)", None)])
    assert np.abs(outputs(new) - outputs(model)).max() < 0.03 * np.abs(outputs(model)).max()
    assert not any("q_proj" in path for path in quantized_leaves(new))


def test_matrices_of_other_methods_in_a_scaled_site_have_statistics_of_the_scaled_input(model) -> None:
    """The Hessian's mean diagonal that q_proj is given is that of what enters it now."""
    rules = [(r".*q_proj", Nested(NF, by_site=False))]
    new = quantize_model(model, EvenInputs(Int(8, group_size=16)), data=TOKENS, rules=rules)
    (noted,) = (dict(notes) for path, _, notes in new.recipe.linears if path == "layers.0.self_attn.q_proj")
    seen = calibrate(new, TOKENS)["layers.0.self_attn.o_proj"]
    assert seen.k == 48
    x = new.blocks[0].input_layernorm(new.embed(jnp.asarray(TOKENS), jnp.zeros(TOKENS.shape, jnp.int32)))
    np.testing.assert_allclose(noted["energy"], np.square(np.asarray(x)).mean(), rtol=1e-4)


def test_a_block_method_is_given_targets_and_a_function_to_train(model) -> None:
    new = quantize_model(model, FitNorms(Int(3, group_size=16)), data=TOKENS)
    notes = {path: dict(notes) for path, _, notes in new.recipe.linears}
    assert len(notes) == 14
    assert all(found["after"] < 0.97 * found["before"] for found in notes.values())
    plain = quantize_model(model, Int(3, group_size=16))
    errors = [float(np.square(outputs(one) - outputs(model)).mean()) for one in (new, plain)]
    assert errors[0] < errors[1]


def test_lifted_methods_give_what_the_methods_give(model) -> None:
    w = jnp.asarray(np.random.default_rng(1).normal(size=(8, 32)), jnp.float32)
    lifted = on_site(NF).apply(SiteWeights({"a": w, "b": 2 * w}), None)
    assert_same(lifted.results["a"].operator, NF.apply(w, None).operator)
    whole = quantize_model(model, on_block(Nested(NF, by_site=False), "by_site"), data=TOKENS)
    assert_same(quantized_leaves(whole), quantized_leaves(quantize_model(model, Nested(NF), data=TOKENS)))
    with pytest.raises(ValueError, match="a block's method already"):
        on_block(FitNorms())


def test_a_blocks_method_that_is_not_sequential_leaves_float_outputs(model) -> None:
    """Also where another method took some of the block's linears before."""
    rules = [(r".*q_proj", Int(2, group_size=16))]
    alone, after = (
        quantized_leaves(quantize_model(model, method, data=TOKENS, rules=rules)) for method in (ANY4, on_block(ANY4))
    )
    path = "layers.1.self_attn.k_proj"
    assert_same(after[path], alone[path])


def test_what_can_not_be_walked_is_refused(model) -> None:
    linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match="toy-even quantizes the matrices of a site together, and an NNX module has no"
    ):
        quantize_model(nnx.Sequential(linear), EvenInputs())
    for method, scope in ((EvenInputs(), "site"), (FitNorms(), "block")):
        with pytest.raises(
            ValueError, match=f"embed_tokens: toy-.* of a {scope} together, and this one is in no {scope}"
        ):
            quantize_model(model, NF, rules=[("embed_tokens", method)], data=TOKENS)
    # That is the fault even where no statistics of its input are there.
    with pytest.raises(
        ValueError, match="embed_tokens: awq quantizes the matrices of a site together, and this one is"
    ):
        quantize_model(model, NF, rules=[("embed_tokens", AWQ())], data=TOKENS)
    with pytest.raises(ValueError, match="got both data and stats"):
        quantize_model(model, NF, data=TOKENS, stats={})
    with pytest.raises(ValueError, match=r"layers\.0\..*_proj: got no data, toy-nested needs"):
        quantize_model(model, SEQUENTIAL)


def test_stacked_matrices_have_their_experts_statistics() -> None:
    from any4_jax import statistics

    rng = np.random.default_rng(2)
    stack = jnp.asarray(rng.normal(size=(2, 16, 8)), jnp.float32)
    x, routed = rng.normal(size=(20, 16)).astype(np.float32), rng.random((2, 20)) < 0.5
    method = Nested(NF)
    seen = statistics.update(statistics.empty(16, method.needs, experts=2), x, None, jnp.asarray(routed))
    result = matrices.quantize_matrix(matrices.Matrix(stack, transposed=True), method, seen, "experts")
    energies = [float(np.square(x[reached]).sum(axis=1).mean() / 16) for reached in routed]
    np.testing.assert_allclose(result.notes["energy"], energies, rtol=1e-5)
    assert result.operator.shape == (2, 8, 16) and result.notes["searched"] is True
    np.testing.assert_array_equal(
        dequantize(result.operator)[1],
        dequantize(matrices.quantize_matrix(matrices.Matrix(stack[1], True), NF, None, "").operator),
    )


def test_data_gives_what_statistics_in_hand_give(model) -> None:
    method = dataclasses.replace(SEQUENTIAL, by_site=False)
    stats = calibrate(model, TOKENS, method)
    assert_same(
        nnx.state(quantize_model(model, method, stats=stats)), nnx.state(quantize_model(model, method, data=TOKENS))
    )
