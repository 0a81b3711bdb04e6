"""fold: factors move between layers and what a block computes stays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from any4_jax.methods import NF4
from any4_jax.models import Site
from any4_jax.models.fold import fold, is_foldable, module_at, scale_channels, scale_outputs
from any4_jax.models.llama import Block
from any4_jax.models.tiny import random_llama, tiny
from any4_jax.walk import quantize_model

SITES = ("attn_in", "attn_out", "mlp_in", "mlp_out")


@pytest.fixture(scope="module")
def model():
    """Six query heads, two key/value heads; with biases, which have to go with their rows."""
    config = dataclasses.replace(random_llama().config, attention_bias=True, mlp_bias=True)
    return random_llama(config)


@pytest.fixture(scope="module")
def block(model) -> Block:
    return model.blocks[0]


def site_of(model, name: str) -> Site:
    return next(site for site in model.sites(0) if site.name == name)


def run(model, block: Block) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The output on a fixed input, and the inputs of the sites."""
    graphdef, state = nnx.split(block)

    @jax.jit
    def tapped(state: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        taps: dict[str, jax.Array] = {}
        positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
        y, _ = type(model).block(graphdef, state, x, model.init_cache(2, 9)[0], positions, taps.__setitem__)
        return y, taps

    x = np.random.default_rng(7).normal(size=(2, 9, 48)).astype(np.float32)
    return jax.tree.map(np.asarray, tapped(state, x))


def factor_for(model, name: str, seed: int = 0) -> np.ndarray:
    """Factors [K] of both signs and several magnitudes; equal among the query heads of a key/value head."""
    k = {"attn_in": 48, "attn_out": 16, "mlp_in": 48, "mlp_out": 88}[name]
    rng = np.random.default_rng(seed)
    factor = (rng.uniform(0.1, 10, k) * rng.choice([-1, 1], k)).astype(np.float32)
    return np.repeat(factor.reshape(2, 8), 3, axis=0).reshape(-1) if name == "attn_out" else factor


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() < 3e-6 * np.abs(b).max())


def leaves(block: nnx.Module) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(nnx.state(block))}


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", SITES)
def test_the_function_stays_and_the_input_is_scaled(model, block: Block, name: str, inverse: bool) -> None:
    site, factor = site_of(model, name), factor_for(model, name)
    before, (y, inputs) = leaves(block), run(model, block)
    folded, leftover = fold(block, site, factor, inverse=inverse)
    assert leftover is None
    new_y, new_inputs = run(model, folded)
    assert close(new_y, y)
    assert close(new_inputs[name], inputs[name] / factor if inverse else inputs[name] * factor)
    others = [other for other in inputs if other != name]
    assert all(close(new_inputs[other], inputs[other]) for other in others)
    assert all(np.array_equal(leaves(block)[key], array) for key, array in before.items())


@pytest.mark.parametrize("name", SITES)
def test_each_array_is_rounded_once(model, block: Block, name: str) -> None:
    """Exact in float32: one product or quotient an array, none by a rounded reciprocal."""
    site, factor = site_of(model, name), factor_for(model, name)
    before, after = leaves(block), leaves(fold(block, site, factor)[0])
    rows = factor.reshape(2, 3, 8)[:, 0].reshape(-1) if name == "attn_out" else factor
    for key, array in before.items():
        path, leaf = key.rsplit(".", 1)
        expected = array
        if path == site.after:
            expected = array * rows
        elif path in site.linears and leaf == "kernel":
            expected = array / factor[:, None]
        np.testing.assert_array_equal(after[key], expected, key)


def test_scale_channels_is_the_first_half(model, block: Block) -> None:
    site, factor = site_of(model, "mlp_out"), factor_for(model, "mlp_out")
    scaled, leftover = scale_channels(block, site, factor)
    assert leftover is None
    changed = [key for key, array in leaves(scaled).items() if not np.array_equal(array, leaves(block)[key])]
    assert sorted(changed) == ["mlp.up_proj.bias", "mlp.up_proj.kernel"]
    assert scaled.mlp.down_proj.kernel.get_value() is block.mlp.down_proj.kernel.get_value()


def test_what_differs_among_query_heads_is_left_over(model, block: Block) -> None:
    """One channel of the first key/value head differs in its second query head; all others are folded."""
    site, factor = site_of(model, "attn_out"), factor_for(model, "attn_out")
    uneven = factor.copy()
    uneven[8 + 5] *= 2
    folded, leftover = fold(block, site, uneven)
    expected = np.ones_like(factor)
    for head in range(3):
        expected[8 * head + 5] = uneven[8 * head + 5]
    np.testing.assert_array_equal(leftover, expected)
    y, inputs = run(model, block)
    new_y, new_inputs = run(model, folded)
    assert close(new_y, y)
    assert close(new_inputs["attn_out"], inputs["attn_out"] * uneven / expected)


def test_under_jit_a_repeated_site_always_has_a_leftover(model, block: Block) -> None:
    site, factor = site_of(model, "attn_out"), factor_for(model, "attn_out")
    graphdef, state = nnx.split(block)

    @jax.jit
    def traced(state: Any, factor: jax.Array) -> tuple[Any, jax.Array]:
        new, leftover = fold(nnx.merge(graphdef, state), site, factor)
        return nnx.state(new), leftover

    new, leftover = traced(state, factor)
    np.testing.assert_array_equal(leftover, np.ones_like(factor))
    expected = leaves(fold(block, site, factor)[0])
    for key, array in leaves(nnx.merge(graphdef, new)).items():
        np.testing.assert_allclose(array, expected[key], rtol=3e-7, err_msg=key)


@pytest.mark.parametrize("after", [None, "mlp", "mlp.up_proj"])
def test_what_can_not_be_scaled_leaves_all_over(model, block: Block, after: str | None) -> None:
    if after == "mlp.up_proj":
        block = quantize_model(model, NF4(group_size=8), rules=[(r"(?!.*up_proj).*", None)]).blocks[0]
    site = dataclasses.replace(site_of(model, "mlp_out"), after=after)
    factor = factor_for(model, "mlp_out")
    assert not is_foldable(block, site)
    for function in (scale_channels, fold):
        new, leftover = function(block, site, factor)
        assert new is block
        np.testing.assert_array_equal(leftover, factor)


def test_the_final_norm_takes_the_factors_of_a_head_of_its_own(model) -> None:
    factor, tokens = factor_for(model, "mlp_in"), np.arange(12)[None]
    folded, leftover = fold(model, model.head_site, factor)
    assert leftover is None and not np.allclose(folded.norm.scale.get_value(), model.norm.scale.get_value())
    assert close(np.asarray(folded(tokens)), np.asarray(model(tokens)))
    tied = tiny()
    assert not is_foldable(tied, tied.head_site)


def test_a_norm_without_a_scale_holds_no_factor() -> None:
    class Pair(nnx.Module):
        def __init__(self, **settings: Any) -> None:
            self.norm = nnx.LayerNorm(8, rngs=nnx.Rngs(0), **settings)
            self.linear = nnx.Linear(8, 4, rngs=nnx.Rngs(0))

    site = Site("in", ("linear",), "norm")
    assert is_foldable(Pair(), site) and not is_foldable(Pair(use_scale=False), site)
    folded, _ = fold(Pair(use_bias=False), site, np.full(8, 2.0))
    np.testing.assert_array_equal(folded.norm.scale.get_value(), np.full(8, 2.0))


def test_a_foreign_layer_is_folded_into_once_it_is_registered(rng: np.random.Generator) -> None:
    """A norm that multiplies by 1 + scale, as Gemma's does."""

    class PlusOne(nnx.Module):
        def __init__(self) -> None:
            self.scale = nnx.Param(jnp.asarray(rng.normal(size=8), jnp.float32))

        def __call__(self, x: jax.Array) -> jax.Array:
            return x * (1 + self.scale[...])

    class Pair(nnx.Module):
        def __init__(self) -> None:
            self.norm, self.linear = PlusOne(), nnx.Linear(8, 4, rngs=nnx.Rngs(0))

    pair, site, factor = Pair(), Site("in", ("linear",), "norm"), rng.uniform(0.5, 2, 8).astype(np.float32)
    assert not is_foldable(pair, site)

    @scale_outputs.register(PlusOne)
    def _(layer: PlusOne, rescale: Any) -> None:
        layer.scale.set_value(rescale(1 + layer.scale.get_value()) - 1)

    x = rng.normal(size=(3, 8)).astype(np.float32)
    folded, leftover = fold(pair, site, factor)
    assert leftover is None
    np.testing.assert_allclose(folded.norm(x), pair.norm(x) * factor, rtol=1e-5)
    np.testing.assert_allclose(folded.linear(folded.norm(x)), pair.linear(pair.norm(x)), atol=1e-5)


def test_16_bit_weights_are_rounded_once_from_float32(model) -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.blocks[0])
    site, factor = site_of(model, "mlp_in"), factor_for(model, "mlp_in")
    folded, _ = fold(half, site, factor)
    before = np.asarray(half.mlp.gate_proj.kernel.get_value(), np.float32)
    got = folded.mlp.gate_proj.kernel.get_value()
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, (before / factor[:, None]).astype(jnp.bfloat16))


def test_misuse_is_refused(model, block: Block) -> None:
    site = site_of(model, "mlp_out")
    for function in (scale_channels, fold):
        with pytest.raises(ValueError, match=r"shape \(3,\), and site mlp_out has K=88 inputs"):
            function(block, site, np.ones(3, np.float32))
    quantized = quantize_model(model, NF4(group_size=8)).blocks[0]
    with pytest.raises(ValueError, match="mlp.down_proj is not an nnx.Linear but Any4Linear; fold before"):
        fold(quantized, site, np.ones(88, np.float32))
    with pytest.raises(TypeError, match="got layer MLP, which has no scale_outputs"):
        scale_outputs(module_at(block, "mlp"), lambda array: array)
