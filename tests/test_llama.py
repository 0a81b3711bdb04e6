"""The Llama family: equal to torch's, cached or not, padded or not, and cheap to compile."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from any4_jax.kv_cache import Cache, DenseCache
from any4_jax.models.hf import from_tensors, read_config
from any4_jax.models.llama import Block, Llama
from any4_jax.models.rope import Rope
from any4_jax.models.tiny import random_llama

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = ("llama2", "llama3", "llama31", "tied", "biases", "head_dim")


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_llama()


def golden(variant: str) -> tuple[Llama, np.ndarray, np.ndarray]:
    """The model, tokens and torch's logits of one golden file."""
    with np.load(GOLDEN / f"llama_{variant}.npz") as file:
        arrays = dict(file)
    config = read_config(json.loads(str(arrays.pop("config"))))
    tokens, logits = arrays.pop("tokens"), arrays.pop("logits")
    return from_tensors(config, arrays, np.float32), tokens, logits


def error(got: jax.Array | np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference in units of the largest wanted number."""
    return float(np.max(np.abs(np.asarray(got) - wanted)) / np.max(np.abs(wanted)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_torch(variant: str) -> None:
    model, tokens, logits = golden(variant)
    got = model(tokens)
    assert got.dtype == jnp.float32
    assert error(got, logits) < 1e-4


@pytest.mark.parametrize(
    "change",
    [{"rope_scaling": None}, {"rope_theta": 20000.0}, {"rms_norm_eps": 1e-2}],
    ids=lambda change: next(iter(change)),
)
def test_golden_logits_tell_configs_apart(change: dict[str, object]) -> None:
    model, tokens, logits = golden("llama31")
    config = dataclasses.replace(model.config, **change)
    other = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    other = nnx.merge(nnx.split(other)[0], nnx.split(model)[1])
    assert error(other(tokens), logits) > 1e-3


@pytest.mark.parametrize("variant", ["llama31", "biases"])
def test_cached_decoding_equals_the_whole_forward(variant: str) -> None:
    model, tokens, logits = golden(variant)
    rows, length = tokens.shape
    graphdef, state = nnx.split(model)

    @jax.jit
    def feed(state: nnx.State, tokens: jax.Array, caches: list[Cache], first: jax.Array) -> tuple:
        model = nnx.merge(graphdef, state)
        positions = first + jnp.arange(tokens.shape[1]) + jnp.zeros((rows, 1), jnp.int32)
        x, caches = model.decode(tokens, caches, positions)
        return model.head(x), caches

    caches, got, first = model.init_cache(rows, length + 7), [], 0
    for step in (5, 7, *[1] * (length - 12)):
        piece, caches = feed(state, tokens[:, first : first + step], caches, first)
        got.append(np.asarray(piece))
        first += step
    assert int(caches[0].length) == length
    assert error(np.concatenate(got, axis=1), logits) < 1e-4


def test_rows_padded_on_the_left_equal_their_single_runs(model: Llama, rng: np.random.Generator) -> None:
    lengths, longest = (3, 11), 11
    rows = [rng.integers(0, 128, n).astype(np.int32) for n in lengths]
    start = np.asarray([longest - n for n in lengths], np.int32)
    padded = np.full((2, longest), 77, np.int32)
    for row, first, target in zip(rows, start, padded, strict=True):
        target[first:] = row

    @jax.jit
    def run(model: Llama) -> jax.Array:
        caches = model.init_cache(2, 16, start=jnp.asarray(start))
        x, _ = model.decode(padded, caches, jnp.arange(longest, dtype=jnp.int32) - start[:, None])
        return model.head(x)

    logits = np.asarray(run(model))
    assert np.isfinite(logits).all()
    for row, first, got in zip(rows, start, logits, strict=True):
        np.testing.assert_allclose(got[first:], np.asarray(model(row[None]))[0], atol=1e-5, rtol=0)


def test_one_program_a_shape_and_none_the_second_time(model: Llama, count_compiles: Any) -> None:
    # A shape of this test alone: another file may have run an equal model in this process.
    with count_compiles() as compiles:
        model(np.ones((3, 13), np.int32))
    assert compiles.names == ["jit(_logits)"]
    with count_compiles() as compiles:
        model(np.zeros((3, 13), np.int32))
    assert compiles.count == 0


@pytest.mark.parametrize("ids", [[[0, 128]], [[-1, 3]]])
def test_ids_outside_the_vocabulary_are_refused(model: Llama, ids: list) -> None:
    for tokens in (np.asarray(ids), jnp.asarray(ids)):
        with pytest.raises(ValueError, match=r"and the vocabulary is 0\.\.127; use the model's own tokenizer"):
            model(tokens)


def test_layers_share_one_program(model: Llama, count_compiles: Any) -> None:
    splits = [nnx.split(layer) for layer in model.layers]
    assert len({graphdef for graphdef, _ in splits}) == 1
    x, positions = jnp.ones((1, 6, 48)), jnp.arange(6)[None]
    caches = model.init_cache(1, 6)
    jitted = jax.jit(Llama.block, static_argnums=0)
    with count_compiles() as compiles:
        for (graphdef, state), cache in zip(splits, caches, strict=True):
            x, _ = jitted(graphdef, state, x, cache, positions)
    assert compiles.count == 1


def test_a_loop_may_carry_and_consume_the_caches() -> None:
    model, tokens = random_llama(), np.asarray([[5, 9, 2]], np.int32)

    def run(caches: Any, tokens: Any) -> Any:
        def step(caches: Any, token: Any) -> Any:
            x, caches = model.decode(token[:, None], caches, (caches[0].length - caches[0].start)[:, None])
            return caches, model.head(x)[:, 0]

        return jax.lax.scan(step, caches, tokens.T)

    _, logits = jax.jit(run, donate_argnums=0)(model.init_cache(1, 8), tokens)
    np.testing.assert_allclose(logits[:, 0], model(tokens)[0], atol=1e-5)


def test_sites_name_every_linear_once_and_taps_see_their_inputs(model: Llama) -> None:
    layer = model.layers[0]
    linears = {
        ".".join(map(str, path)): module for path, module in nnx.iter_modules(layer) if isinstance(module, nnx.Linear)
    }
    named = [path for site in model.sites(0) for path in site.linears]
    assert sorted(named) == sorted(linears)

    @jax.jit
    def run(layer: Block) -> tuple[dict[str, jax.Array], list[tuple[jax.Array, jax.Array]]]:
        x, positions = jnp.ones((2, 5, 48)), jnp.arange(5) + jnp.zeros((2, 1), jnp.int32)
        inputs: dict[str, jax.Array] = {}
        y, _ = layer(x, model.init_cache(2, 5)[0], positions, inputs.__setitem__)
        order.extend(inputs)
        stream = x + layer.self_attn.o_proj(inputs["attn_out"])
        equal = [
            (layer.input_layernorm(x), inputs["attn_in"]),
            (layer.post_attention_layernorm(stream), inputs["mlp_in"]),
            (stream + layer.mlp.down_proj(inputs["mlp_out"]), y),
        ]
        return inputs, equal

    order: list[str] = []
    inputs, equal = run(layer)
    assert order == [site.name for site in model.sites(0)]
    for site in model.sites(0):
        assert {linears[path].in_features for path in site.linears} == {inputs[site.name].shape[-1]}
    for wanted, got in equal:
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_an_abstract_model_has_the_structure_of_a_real_one(model: Llama) -> None:
    abstract = nnx.eval_shape(lambda: Llama(model.config, rngs=nnx.Rngs(0)))
    assert nnx.split(abstract)[0] == nnx.split(model)[0]
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(abstract)))


def test_bfloat16_model_keeps_to_bfloat16_and_gives_float32_logits(model: Llama) -> None:
    half = nnx.eval_shape(lambda: Llama(model.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.bfloat16)}
    state = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), nnx.state(model))
    half = nnx.merge(graphdef, state)
    assert half.init_cache(1, 4)[0].keys.dtype == jnp.bfloat16
    tokens = np.arange(12, dtype=np.int32)[None]
    assert half(tokens).dtype == jnp.float32
    assert 1e-4 < error(half(tokens), np.asarray(model(tokens))) < 0.1


def test_rotation_keeps_lengths_and_depends_on_distance_only(rng: np.random.Generator) -> None:
    rope = Rope(16, 10000.0)
    q, k = rng.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)
    rotate = jax.jit(rope.rotate)

    def rotated(x: np.ndarray, position: int) -> np.ndarray:
        return np.asarray(rotate(x, np.asarray([[position]], np.int32)))

    def product(a: int, b: int) -> float:
        return float(np.sum(rotated(q, a) * rotated(k, b)))

    np.testing.assert_allclose(np.linalg.norm(rotated(q, 99)), np.linalg.norm(q), rtol=1e-5)
    np.testing.assert_allclose(product(7, 3), product(107, 103), rtol=1e-4)
    assert abs(product(7, 3) - product(3, 7)) > 1e-2


@pytest.mark.parametrize(
    "tokens, kind, words",
    [
        (np.ones((1, 3), np.float32), TypeError, "float32"),
        (np.ones(3, np.int32), ValueError, r"\(3,\)"),
        (np.ones((2, 0), np.int32), ValueError, r"\(2, 0\)"),
    ],
)
def test_bad_tokens_are_refused(model: Llama, tokens: np.ndarray, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        model(tokens)


def test_more_tokens_than_slots_are_refused() -> None:
    cache = DenseCache.create(0, 1, 4, 2, 8, jnp.zeros(1, jnp.int32), jnp.float32)
    new = jnp.zeros((1, 5, 2, 8))
    with pytest.raises(ValueError, match="5 tokens don't fit in a cache of 4 slots"):
        cache.append(new, new, jnp.arange(5)[None], Rope(8, 10000.0))
    assert isinstance(cache, Cache)
