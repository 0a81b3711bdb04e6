"""Hugging Face's Flax models: FlaxLlama computes what torch does, and any of them runs on quantized weights."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

import any4_jax as a4
from any4_jax.models.flax_llama import abstract_flax_llama, is_repaired, load_hf_flax
from any4_jax.models.hf_flax import abstract_model, dense_paths, is_hf_flax, with_params
from any4_jax.surgery import container_of, quantized_leaves

transformers = pytest.importorskip("transformers.models.llama.modeling_flax_llama", reason="needs transformers 4")

GOLDEN = Path(__file__).parent / "golden"
NEVER = 999  # no token of any of these vocabularies
INT4 = a4.methods.Int(4, group_size=8)
SMALL = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
LLAMA = SMALL | {"intermediate_size": 32, "num_key_value_heads": 2, "max_position_embeddings": 131072}
MISTRAL = LLAMA | {"num_key_value_heads": 4, "max_position_embeddings": 32, "head_dim": 8}
# Class -> config, and the name of a dense layer that it must have.
FAMILIES = {
    "FlaxMistralForCausalLM": (MISTRAL, "model.layers.0.self_attn.o_proj"),
    "FlaxGemmaForCausalLM": (MISTRAL, "model.layers.0.mlp.down_proj"),
    "FlaxOPTForCausalLM": (
        SMALL | {"ffn_dim": 32, "word_embed_proj_dim": 32, "max_position_embeddings": 32},
        "model.decoder.layers.0.fc1",
    ),
    "FlaxGPT2LMHeadModel": (
        {"vocab_size": 32, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32},
        "transformer.h.0.attn.c_attn",
    ),
    "FlaxBertForMaskedLM": (
        SMALL | {"intermediate_size": 32, "max_position_embeddings": 32},
        "bert.encoder.layer.0.attention.self.query",
    ),
}


def write(folder: Path, variant: str, shards: int = 1, **changes: Any) -> tuple[Path, np.ndarray, np.ndarray]:
    """A Hugging Face folder of one golden file, its tokens and torch's logits."""
    with np.load(GOLDEN / f"llama_{variant}.npz") as file:
        arrays = dict(file)
    config, tokens, logits = json.loads(str(arrays.pop("config"))), arrays.pop("tokens"), arrays.pop("logits")
    (folder / "config.json").write_text(json.dumps(config | changes))
    names = sorted(arrays)
    files = {f"part-{i}.safetensors": names[i::shards] for i in range(shards)}
    if shards == 1:
        files = {"model.safetensors": names}
    else:
        weight_map = {name: file for file, part in files.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file, part in files.items():
        save_file({name: arrays[name] for name in part}, folder / file)
    return folder, tokens, logits


def load_quietly(folder: Path | str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return load_hf_flax(folder, dtype=jnp.float32)


def logits_of(hf: Any, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lambda params: hf(jnp.asarray(tokens), params=params).logits)(hf.params))


def both(hf: Any) -> tuple[Any, Any]:
    """The model with every dense layer quantized, and the float model of what these weights stand for."""
    flat, paths = flatten_dict(hf.params), dense_paths(hf)
    turned = {(*path.split("."), "kernel"): turned for path, turned in paths.items()}

    @jax.jit  # one program: op by op, each shape costs a second
    def convert(kernels: list[jax.Array]) -> tuple[list[Any], list[jax.Array]]:
        operators = [a4.quantize(k, INT4, transposed=t) for k, t in zip(kernels, turned.values(), strict=True)]
        matrices = [a4.dequantize(operator) for operator in operators]
        return operators, [m.T if t else m for m, t in zip(matrices, turned.values(), strict=True)]

    small, dense = (
        unflatten_dict(flat | dict(zip(turned, kernels, strict=True))) for kernels in convert([flat[k] for k in turned])
    )
    return with_params(hf, small), with_params(hf, dense)


def random_model(name: str, config: dict[str, Any], rng: np.random.Generator) -> Any:
    cls = getattr(sys.modules["transformers"], name)
    hf = abstract_model(name, cls.config_class(**config).to_dict(), jnp.float32)
    draw = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), hf.params)
    return with_params(hf, draw)


@pytest.mark.parametrize(
    "variant, shards, form, ignored",
    [
        ("llama2", 1, 4, None),
        ("llama3", 2, 4, "rope_theta=500000"),
        ("llama31", 1, 4, "rope_scaling"),
        ("llama31", 1, 5, "rope_scaling"),
        ("tied", 1, 4, "tie_word_embeddings"),
    ],
)
def test_logits_equal_those_of_torch_and_repairs_are_told(
    tmp_path: Path, variant: str, shards: int, form: int, ignored: str | None
) -> None:
    folder, tokens, wanted = write(tmp_path, variant, shards)
    if form == 5:  # transformers 5 writes one dict
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"] = config.pop("rope_scaling") | {"rope_theta": config.pop("rope_theta")}
        (folder / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hf = load_hf_flax(folder, dtype=jnp.float32)
    said = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert said == [] if ignored is None else [ignored in text and text.count("=") <= 1 for text in said] == [True]
    assert isinstance(hf, transformers.FlaxLlamaForCausalLM) and is_hf_flax(hf) and is_repaired(hf)
    assert np.max(np.abs(logits_of(hf, tokens) - wanted)) < 1e-4 * np.max(np.abs(wanted))
    assert hf.generation_config.eos_token_id == hf.config.eos_token_id == 2


@pytest.mark.parametrize("variant, reason", [("biases", "mlp_bias"), ("head_dim", "head_dim=16")])
def test_what_flax_llama_cannot_compute_is_refused(tmp_path: Path, variant: str, reason: str) -> None:
    folder, _, _ = write(tmp_path, variant)
    with pytest.raises(ValueError, match=reason):
        load_hf_flax(folder)


def test_stored_dtype_bundled_model_and_its_tokenizer() -> None:
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        hf = load_hf_flax("tiny")
    own = a4.models.load("tiny")
    assert {leaf.dtype for leaf in jax.tree.leaves(hf.params)} == {own.dtype}
    assert hf.tokenizer.encode("Once upon") == own.tokenizer.encode("Once upon")
    assert (hf.config.vocab_size, hf.generation_config.eos_token_id) == (512, own.config.eos_token_ids[0])


@pytest.mark.slow
def test_greedy_tokens_equal_those_of_float_weights_and_of_our_own_model(tmp_path: Path) -> None:
    folder, tokens, _ = write(tmp_path, "llama3", eos_token_id=NEVER)
    small, dense = both(load_quietly(folder))
    prompt, how = tokens[:1, :5], dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    run = jax.jit(lambda params: small.generate(jnp.asarray(prompt), params=params, **how).sequences)
    got = np.asarray(run(small.params))
    assert got.shape == (1, 17) and got[:, :5].tolist() == prompt.tolist()
    # Float weights, no cache, all positions at once.
    assert np.argmax(logits_of(dense, got), axis=-1)[:, 4:-1].tolist() == got[:, 5:].tolist()
    operators = {path.removeprefix("model."): operator for path, operator in quantized_leaves(small).items()}
    own = a4.models.load(folder, dtype=jnp.float32)
    own = container_of(own).replace(own, operators, None)
    assert set(quantized_leaves(own)) == set(operators)
    assert a4.generate(own, prompt[0].tolist(), max_new_tokens=12) == got[0, 5:].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"do_sample": True, "top_k": 0}, {"num_beams": 3, "do_sample": False}], ids=str)
def test_sampled_and_beam_tokens_equal_those_of_float_weights(rng: np.random.Generator, how: dict[str, Any]) -> None:
    hf = random_model("FlaxLlamaForCausalLM", LLAMA | {"max_position_embeddings": 64, "eos_token_id": NEVER}, rng)

    def tokens(model: Any) -> list[list[int]]:
        def run(params: Any) -> jax.Array:
            key = jax.random.key(3)
            start = jnp.asarray([[1], [7]])
            return model.generate(start, params=params, prng_key=key, max_new_tokens=8, pad_token_id=0, **how).sequences

        return np.asarray(jax.jit(run)(model.params)).tolist()

    small, dense = both(hf)
    got = tokens(small)
    assert got == tokens(dense) and got[0][1:] != got[1][1:]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs_on_quantized_weights(name: str, rng: np.random.Generator) -> None:
    config, layer = FAMILIES[name]
    hf = random_model(name, config, rng)
    assert layer in dense_paths(hf) and not any("embed" in path for path in dense_paths(hf))
    before = hf.params
    small, dense = both(hf)
    tokens = rng.integers(0, 32, (2, 9))
    got, wanted = logits_of(small, tokens), logits_of(dense, tokens)
    assert np.max(np.abs(got - wanted)) < 1e-5 * np.max(np.abs(wanted))
    assert hf.params is before and type(small).__name__ == name and isinstance(small, type(hf))
    with pytest.raises(ValueError, match=r"any4_jax\.save"):
        small.save_pretrained("nowhere")


def test_long_contexts_need_no_square_mask(rng: np.random.Generator) -> None:
    config = LLAMA | {"model_type": "llama", "eos_token_id": NEVER}
    hf = abstract_flax_llama(config, jnp.float32)
    start = jnp.ones((1, 3), jnp.int32)
    run = jax.jit(lambda params: hf.generate(start, params=params, max_new_tokens=5, pad_token_id=0).sequences)
    memory = run.lower(hf.params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**20  # the mask alone would be 2**34


@pytest.mark.parametrize("name", ["FlaxLlamaForCausalLM", "FlaxBartForConditionalGeneration"])
def test_a_cache_is_made_without_weights(name: str, count_compiles: Callable[..., Any]) -> None:
    cls = getattr(sys.modules["transformers"], name)
    bart = {"vocab_size": 32, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "max_position_embeddings": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = cls.config_class(**(bart | heads if "Bart" in name else LLAMA | {"max_position_embeddings": 64}))
    hf = abstract_model(name, config.to_dict(), jnp.float32)
    extra = ({"last_hidden_state": jnp.zeros((2, 5, 32))},) if "Bart" in name else ()
    extra = tuple(sys.modules["transformers"].modeling_flax_outputs.FlaxBaseModelOutput(**kwargs) for kwargs in extra)
    theirs = jax.eval_shape(lambda: cls.init_cache(hf, 2, 11, *extra))
    with count_compiles() as compiles:
        cache = hf.init_cache(2, 11, *extra)
    assert compiles.count <= len({leaf.shape for leaf in jax.tree.leaves(cache)})
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), theirs) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), cache
    )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(cache))


def test_the_abstract_model_of_a_config_is_the_loaded_one_without_weights(tmp_path: Path) -> None:
    hf = load_quietly(write(tmp_path, "llama31")[0])
    abstract = abstract_flax_llama(json.loads(json.dumps(hf.config.to_dict())), jnp.float32)
    assert is_repaired(abstract) and abstract.config.to_dict() == hf.config.to_dict()
    assert jax.tree.map(lambda leaf: leaf.shape, abstract.params) == jax.tree.map(lambda leaf: leaf.shape, hf.params)
    assert {type(leaf) for leaf in jax.tree.leaves(abstract.params)} == {jax.ShapeDtypeStruct}
    bare = transformers.FlaxLlamaForCausalLM(hf.config, _do_init=False)
    assert not is_repaired(bare) and not is_repaired(with_params(bare, hf.params))
    assert not is_hf_flax(a4.models.load(tmp_path)) and not is_hf_flax(hf.params)


def test_a_class_that_transformers_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="'LlamaForCausalLM'"):
        abstract_model("LlamaForCausalLM", {}, jnp.float32)


def test_without_flax_models_both_ways_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.modeling_flax_utils", None)
    with pytest.raises(ImportError, match=r"any4_jax\[hf-flax\].*any4_jax\.models\.load"):
        load_hf_flax("tiny")


def test_a_quantized_model_says_what_runs_where_and_keeps_its_head(rng: np.random.Generator) -> None:
    hf = random_model("FlaxLlamaForCausalLM", LLAMA, rng)
    small = a4.quantize_model(hf, INT4)
    layers = quantized_leaves(small)
    assert set(layers) == set(dense_paths(hf)) - {"lm_head"} and len(layers) == 7
    assert small.params["lm_head"]["kernel"] is hf.params["lm_head"]["kernel"]
    shown = a4.explain(small)
    for path in dense_paths(hf):
        assert path.replace(".0.", ".*.") + "  [" in shown
    # The parameters shrink by what the layers' claimed bits say, and by nothing else.
    saved = sum(np.prod(q.shape) * (32 - q.bits_per_weight) / 8 for q in layers.values())
    stored = [sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) for model in (hf, small)]
    assert stored[0] - stored[1] == saved


def test_low_rank_updates_over_quantized_weights_are_trained_alone(rng: np.random.Generator) -> None:
    small = a4.quantize_model(random_model("FlaxLlamaForCausalLM", LLAMA, rng), INT4)
    tokens = jnp.asarray(rng.integers(0, 32, (2, 6)))
    tuned = a4.add_lora(small, rank=2)
    np.testing.assert_array_equal(logits_of(tuned, tokens), logits_of(small, tokens))
    trained, frozen = a4.partition(tuned.params, a4.trainable(tuned.params, "lora"))

    @jax.jit
    def slope(trained: Any) -> Any:
        return jax.grad(lambda t: (tuned(tokens, params=a4.combine(t, frozen)).logits ** 2).mean())(trained)

    found = jax.tree.leaves(slope(trained))
    # a and b of seven layers; a's are zero while b is.
    assert len(found) == 14 and sum(bool(np.any(leaf)) for leaf in found) == 7


def test_a_model_that_generates_nothing_is_saved_and_loaded(tmp_path: Path, rng: np.random.Generator) -> None:
    hf = random_model("FlaxBertForMaskedLM", FAMILIES["FlaxBertForMaskedLM"][0], rng)
    hf.generation_config = None
    small = a4.quantize_model(hf, INT4)
    a4.save(tmp_path / "saved", small)
    back = a4.load(tmp_path / "saved", into=hf)
    for ours, theirs in zip(jax.tree.leaves(back.params), jax.tree.leaves(small.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_declared_kernel_is_calibrated_and_quantized(rng: np.random.Generator) -> None:
    hf = random_model("FlaxBertForMaskedLM", FAMILIES["FlaxBertForMaskedLM"][0], rng)
    path, batch = "bert.encoder.layer.0.intermediate.dense", {"input_ids": jnp.asarray(rng.integers(32, size=(2, 6)))}
    rules = [(path, INT4, a4.Axes("KN"))]
    declared, plain = (a4.calibrate(hf, [batch], rules=each) for each in (rules, None))
    assert declared.keys() == plain.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), declared[path], plain[path])
    small = a4.quantize_model(hf, None, data=[batch], rules=rules)
    assert list(quantized_leaves(small)) == [path]
    assert jnp.isfinite(small(**batch).logits).all()
