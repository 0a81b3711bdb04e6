"""Families: a foreign one from its folder to text, and what the registry refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_family
from flax import nnx

import any4_jax as a4
from any4_jax.data import bundled
from any4_jax.methods import NF4
from any4_jax.models import Llama, LlamaConfig, RopeScaling, families, hf
from any4_jax.models.degrid import degrid
from any4_jax.models.family import GGUF, matches, renamed
from any4_jax.models.llama_family import LLAMA
from any4_jax.models.tiny import random_llama, random_tensors
from any4_jax.statistics import Moments

TEXT = "Once upon a time, there was a little girl named Lily. She loved to play in the park."


@pytest.fixture(scope="module")
def registered() -> Iterator[families.Family]:
    yield families.register(toy_family.TOY)
    del families.FAMILIES["toy"]


@pytest.fixture(scope="module")
def toy(registered, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, np.ndarray]]:
    """A toy loaded from its folder, and its tensors."""
    folder = tmp_path_factory.mktemp("toy")
    with bundled("stories260k") as stories:
        tensors = toy_family.write_folder(folder, (stories / "tokenizer.json").read_bytes())
    return a4.models.load(folder), tensors


def test_a_foreign_family_is_loaded_from_its_folder(toy) -> None:
    model, tensors = toy
    assert type(model) is toy_family.Toy and model.tokenizer is not None
    assert families.family_of(model) is families.family_of_config(model.config) is families.named("toy")
    back = hf.tensors_of(model)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


def test_its_logits_are_those_of_numpy(toy) -> None:
    model, tensors = toy
    tokens = np.arange(3, 33)
    expected, _ = toy_family.logits_of(tensors, tokens)
    np.testing.assert_allclose(model(tokens[None])[0], expected, atol=1e-4 * np.abs(expected).max())


def test_it_generates_from_ragged_prompts(toy) -> None:
    """Padding shifts the slots of a row and not its positions, which the embedding is given."""
    model, tensors = toy
    rows = [[5, 9, 2], [100, 3, 3, 7, 64, 2, 8]]
    new = a4.generate(model, rows, max_new_tokens=12)
    for row, tokens in zip(rows, new, strict=True):
        logits, _ = toy_family.logits_of(tensors, np.asarray(row + tokens))
        assert np.argmax(logits, axis=-1)[len(row) - 1 : -1].tolist() == tokens
    assert isinstance(a4.generate(model, TEXT, max_new_tokens=4), str)


def test_its_perplexity_is_that_of_numpy(toy) -> None:
    model, tensors = toy
    ids = np.random.default_rng(0).integers(0, 512, 32)
    losses = []
    for window in ids.reshape(2, 16):
        logits, _ = toy_family.logits_of(tensors, window)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses.append(-logs[np.arange(15), window[1:]].mean())
    measured = a4.evaluation.perplexity(model, ids, seqlen=16)
    np.testing.assert_allclose(measured.window_nll, losses, rtol=1e-4)


def test_it_is_calibrated_and_quantized(toy) -> None:
    model, tensors = toy
    tokens = np.arange(3, 33)
    stats = a4.calibrate(model, tokens[None])
    blocks = {f"h.{i}.{name}" for i in range(2) for name in ("query", "key", "value", "out", "up", "down")}
    assert set(stats) == {"wte", *blocks}
    _, first = toy_family.logits_of(tensors, tokens)
    moments = stats["h.0.query"][Moments()]
    np.testing.assert_allclose(moments.second_moment, np.square(first).mean(0), rtol=1e-3, atol=1e-5)
    small = a4.quantize_model(model, NF4(group_size=8), stats=stats)
    assert set(a4.surgery.quantized_leaves(small)) == blocks
    assert len(a4.generate(small, [5, 9, 2], max_new_tokens=5, eos=())) == 5


def test_it_is_saved_and_loaded(toy, tmp_path: Path) -> None:
    small = a4.quantize_model(toy[0], NF4(group_size=8))
    a4.save(tmp_path / "toy", small)
    back = a4.load(tmp_path / "toy")
    assert type(back) is toy_family.Toy and back.config == small.config and back.tokenizer == small.tokenizer
    tokens = np.arange(3, 33)[None]
    np.testing.assert_array_equal(back(tokens), small(tokens))


def test_degrid_keeps_its_function(toy) -> None:
    model, _ = toy
    moved = degrid(model)
    tokens = np.arange(3, 33)[None]
    logits = np.asarray(model(tokens))
    np.testing.assert_allclose(moved(tokens), logits, atol=2e-5 * np.abs(logits).max())
    changed = {
        ".".join(map(str, path))
        for (path, before), (_, after) in zip(
            nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(moved)), strict=True
        )
        if not np.array_equal(before.get_value(), after.get_value())
    }
    parts = ["ln.scale", "ln.bias", "value.bias", *(f"{n}.kernel" for n in ("query", "key", "value", "up", "out"))]
    assert changed == {f"h.{i}.{part}" for i in range(2) for part in parts}


def test_its_config_comes_back_from_json(toy) -> None:
    model, _ = toy
    config = dataclasses.replace(model.config, eos_token_ids=(2, 7))
    content = json.loads(json.dumps(toy_family.TOY.config_to_json(config)))
    assert toy_family.TOY.config_from_json(content) == config
    assert toy_family.TOY.config_from_json({**content, "heads": None}).heads is None


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
    ],
)
def test_a_llamas_config_comes_back_from_json(scaling: RopeScaling | None) -> None:
    config = dataclasses.replace(random_llama().config, rope_scaling=scaling, eos_token_ids=(1, 2))
    content = json.loads(json.dumps(LLAMA.config_to_json(config)))
    assert LLAMA.config_from_json(content) == config
    with pytest.raises(ValueError, match="the unknown keys surprise; upgrade any4_jax"):
        LLAMA.config_from_json({**content, "surprise": 1})


def test_an_abstract_model_has_the_structure_of_a_real_one() -> None:
    model = random_llama()
    abstract = LLAMA.abstract(model.config, jnp.float32)
    assert nnx.split(abstract)[0] == nnx.split(model)[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(LLAMA.abstract(model.config, jnp.bfloat16)))} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(abstract)))


def test_each_abstract_model_is_ones_own_and_of_its_very_config() -> None:
    """Configs that are equal, but differ in the types of their values, are told apart."""
    whole = random_llama().config
    kept, changed = (LLAMA.abstract(whole, jnp.float32) for _ in range(2))
    changed.norm.scale.set_value(jnp.ones(3))
    changed.layers.pop()
    assert nnx.state(LLAMA.abstract(whole, jnp.float32)) == nnx.state(kept) != nnx.state(changed)
    for theta in (5, 5.0):
        config = LLAMA.abstract(dataclasses.replace(whole, rope_theta=theta), jnp.float32).config
        assert type(config.rope_theta) is type(theta)


class Shifted(Llama):
    """A Llama that embeds in another way."""

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return super().embed(tokens, positions) + 0.1 * positions[..., None]


def shifted(model: Llama) -> Shifted:
    other = nnx.eval_shape(lambda: Shifted(model.config, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.split(other)[0], nnx.state(model))


def test_a_subclass_is_no_llama() -> None:
    model = shifted(random_llama())
    with pytest.raises(TypeError, match="got a Shifted, which belongs to no family .the families have .*Llama"):
        families.family_of(model)
    with pytest.raises(TypeError, match="Shifted"):
        hf.tensors_of(model)


def test_a_subclass_runs_and_calibrates_with_its_own_embedding() -> None:
    plain = random_llama()
    model, tokens = shifted(plain), np.arange(2, 14)[None]
    likeliest = np.asarray(model(tokens)).argmax(-1)[0, -1]
    assert a4.generate(model, tokens[0], max_new_tokens=1, eos=()) == [likeliest]
    assert not np.allclose(model(tokens), plain(tokens), atol=1e-3)
    path = "layers.0.self_attn.q_proj"
    ours, theirs = (jax.tree.leaves(a4.calibrate(m, tokens)[path]) for m in (model, plain))
    assert not all(np.allclose(a, b, rtol=1e-3) for a, b in zip(ours, theirs, strict=True))


def rival(**changes: Any) -> families.Family:
    class Config(LlamaConfig):
        pass

    class Rival(Llama):
        pass

    own = dict(name="rival", module=Rival, config=Config, architectures=("Rival",), model_types=("rival",), gguf=None)
    return dataclasses.replace(LLAMA, **own | changes)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"name": "llama"}, "the name of family 'llama' is that of family 'llama'"),
        ({"config": LlamaConfig}, "the config of family 'rival'"),
        ({"architectures": ("Rival", "LlamaForCausalLM")}, "'rival' claims LlamaForCausalLM, which family 'llama' has"),
        ({"model_types": ("llama",)}, "'rival' claims llama"),
        ({"gguf": GGUF(architecture="llama", names=(), read_config=lambda file: None)}, "'rival' claims llama"),
    ],
)
def test_families_share_no_name_and_no_config(changes: dict[str, Any], words: str) -> None:
    before = dict(families.FAMILIES)
    with pytest.raises(ValueError, match=words):
        families.register(rival(**changes))
    assert before == families.FAMILIES


def test_what_is_unknown_is_refused_with_what_is_known(registered, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["PhiForCausalLM"]}))
    known = ", ".join(name for family in families.FAMILIES.values() for name in family.architectures)
    assert known.startswith("LlamaForCausalLM, ") and known.endswith(", ToyLMHeadModel")
    with pytest.raises(ValueError, match=rf"PhiForCausalLM is not supported \(supported: {known}\)"):
        a4.models.load(tmp_path)
    with pytest.raises(ValueError, match=r"model_type 'phi' is not supported \(supported: 'llama', .*, 'toy'\)"):
        families.by_architecture({"model_type": "phi"})
    with pytest.raises(ValueError, match=r"architecture 'phi2' is not supported \(supported: 'llama', 'llama with exp"):
        families.by_gguf("phi2")
    with pytest.raises(ValueError, match="architecture 'qwen2 with experts' is not supported"):
        families.by_gguf("qwen2", experts=True)
    with pytest.raises(ValueError, match="got family 'phi', and the registered families are llama, .*, toy"):
        families.named("phi")
    with pytest.raises(TypeError, match="got a dict, and the config of a family is needed; pass a LlamaConfig or"):
        hf.from_tensors({}, {})
    assert families.by_architecture({"model_type": "llama"}) is LLAMA


def test_a_path_without_a_name_is_named() -> None:
    with pytest.raises(ValueError, match="layers.0.gate.kernel has no Hugging Face name in family 'llama'"):
        LLAMA.hf_name(("layers", 0, "gate", "kernel"))


@pytest.mark.parametrize(
    "name, expected",
    [("a.3.q_w", "b_q.3"), ("a.33.q_norm_w", "b_q_norm.33"), ("a.x.q_w", None), ("a.3.q.w", None), ("axb", None)],
)
def test_templates(name: str, expected: str | None) -> None:
    names = (("a.b", "plain"), ("a.{i}.{word}_w", "b_{word}.{i}"))
    assert renamed(names, name) == expected
    assert matches([ours for ours, _ in names], name) == (expected is not None)


def test_random_tensors_are_those_of_every_version() -> None:
    """numpy's draws in the order of the variables: benchmarks and tests name their models by shape and seed."""
    tensors = random_tensors(random_llama().config, seed=5)
    first = next(iter(tensors))
    assert first == "model.embed_tokens.weight"
    expected = np.random.default_rng(5).normal(0.0, 48**-0.5, (128, 48)).astype(np.float32)
    np.testing.assert_array_equal(tensors[first], expected)
