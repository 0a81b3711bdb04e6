"""Mixtures of experts: a step reads the chosen experts alone, and statistics are those of the tokens that reach one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_same
from family_goldens import golden
from flax import nnx
from toy_methods import EvenInputs

import any4_jax as a4
from any4_jax.methods.apply import apply_site
from any4_jax.methods.base import SiteWeights
from any4_jax.models.base import PRECISION
from any4_jax.models.experts import MoE
from any4_jax.models.layers import Layers
from any4_jax.nn.nnx import Any4Linear
from any4_jax.weights import ScaleInput

HIDDEN, INNER, COUNT, TOP = 16, 24, 6, 2


@pytest.fixture
def moe() -> MoE:
    layers = Layers.of(jnp.float32, None, nnx.Rngs(0))
    return MoE(HIDDEN, INNER, COUNT, layers, top=TOP, normalized=True)


@pytest.fixture
def quantized(moe: MoE) -> MoE:
    made = a4.quantize_model(moe, a4.methods.NF4(group_size=8))
    assert isinstance(made.router, nnx.Linear)
    assert isinstance(made.experts.up_proj, Any4Linear)
    return made


def one_by_one(moe: MoE, x: np.ndarray) -> np.ndarray:
    """Each token through each of its experts, in numpy."""
    kernels = {
        name: np.asarray(a4.dequantize(getattr(moe.experts, name).weight)).swapaxes(1, 2)
        if isinstance(getattr(moe.experts, name), Any4Linear)
        else np.asarray(getattr(moe.experts, name).kernel[...])
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    logits = x @ np.asarray(moe.router.kernel[...])
    out = np.zeros_like(x)
    for place in np.ndindex(*x.shape[:2]):
        best = np.argsort(-logits[place])[:TOP]
        shares = np.exp(logits[place][best] - logits[place].max())
        for expert, share in zip(best, shares / shares.sum(), strict=True):
            gate = x[place] @ kernels["gate_proj"][expert]
            inner = gate / (1 + np.exp(-gate)) * (x[place] @ kernels["up_proj"][expert])
            out[place] += share * (inner @ kernels["down_proj"][expert])
    return out


# One token has 2 choices, fewer than there are experts; nine tokens have more.
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("kind", ["moe", "quantized"])
def test_each_token_gets_the_weighted_sum_of_its_experts(kind: str, tokens: int, request, rng) -> None:
    layer = request.getfixturevalue(kind)
    x = rng.normal(size=(1, tokens, HIDDEN)).astype(np.float32)
    # A GPU's default precision keeps 10 bits; blocks ask for more, and this layer is outside of one.
    with jax.default_matmul_precision(PRECISION):
        got = nnx.jit(lambda m, x: m(x))(layer, x)
    np.testing.assert_allclose(got, one_by_one(layer, x), atol=2e-5, rtol=1e-4)


def test_a_step_reads_the_chosen_experts_alone(quantized: MoE, rng) -> None:
    x = rng.normal(size=(1, 1, HIDDEN)).astype(np.float32)
    chosen, _ = quantized.route(jnp.asarray(x))
    others = np.setdiff1d(np.arange(COUNT), chosen)
    wanted = np.asarray(quantized(x))
    for linear in (quantized.experts.gate_proj, quantized.experts.up_proj, quantized.experts.down_proj):
        leaf = linear.weight
        linear.weight = dataclasses.replace(leaf, scales=leaf.scales.at[others].set(jnp.nan))
    np.testing.assert_array_equal(quantized(x), wanted)
    linear.weight = dataclasses.replace(leaf, scales=leaf.scales.at[chosen[0, 0, 0]].set(jnp.nan))
    assert np.isnan(np.asarray(quantized(x))).all()


def test_statistics_are_those_of_the_tokens_that_reach_an_expert() -> None:
    wanted = golden("mixtral")
    model = wanted.model()
    stats = a4.calibrate(model, wanted.tokens)
    x = model.embed(wanted.tokens, None)

    # One program, where each operation of a block would be one.
    @jax.jit
    def run(block: Any, x: jax.Array) -> dict[str, tuple]:
        seen: dict[str, tuple] = {}
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        block(x, model.init_cache(*x.shape[:2])[0], positions, lambda name, *rest: seen.__setitem__(name, rest))
        return seen

    seen = run(model.layers[0], x)
    for site, path in (("experts_in", "gate_proj"), ("experts_out", "down_proj")):
        inputs, routed = (np.asarray(a) for a in seen[site])
        gathered = stats[f"layers.0.mlp.experts.{path}"]
        assert routed.shape[0] == 4 and routed.sum() == 2 * wanted.tokens.size
        for expert, reached in enumerate(routed):
            own = (inputs[expert] if inputs.ndim == 4 else inputs)[reached]
            got = gathered.of_expert(expert)[a4.statistics.Moments()]
            np.testing.assert_allclose(got.second_moment, (own.astype(np.float64) ** 2).mean(0), rtol=1e-4)


def test_a_site_method_takes_each_expert_for_a_site() -> None:
    """It sees the matrices that read the input of one expert, the statistics of its tokens, and keeps its factors."""
    wanted, method = golden("mixtral"), EvenInputs(a4.methods.Int(8, group_size=4, scale_dtype="float32"))
    model, path = wanted.model(), "layers.0.mlp.experts."
    rules = [(r"layers\.0\.mlp\.experts\..*", method)]
    made = a4.quantize_model(model, None, data=wanted.tokens, rules=rules)
    stats = a4.calibrate(model, wanted.tokens, method)
    old, new = (each.layers[0].mlp.experts for each in (model, made))
    for names in (("gate_proj", "up_proj"), ("down_proj",)):
        for expert in range(4):
            own = {name: getattr(old, name).kernel[expert].T for name in names}
            seen = stats[path + names[0]].of_expert(expert)
            alone = apply_site(SiteWeights(own, foldable=False), method, seen, "expert")
            for name, result in alone.results.items():
                found = jax.tree.map(lambda leaf, expert=expert: leaf[expert], getattr(new, name).weight)
                assert_same(found, ScaleInput(result.operator, alone.input_scale))
    notes = {path: dict(noted) for path, _, noted in made.recipe.linears}
    assert notes[path + "up_proj"]["input_scale"] == "kept, each expert has its own"
    assert len(notes[path + "up_proj"]["largest"]) == 4
    logits = np.asarray(model(wanted.tokens))
    np.testing.assert_allclose(made(wanted.tokens), logits, atol=0.02 * np.abs(logits).max())
