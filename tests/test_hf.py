"""Hugging Face configs, names, folders; the tiny model; degrid."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from any4_jax import models
from any4_jax.data import bundled
from any4_jax.models import hf
from any4_jax.models.config import RopeScaling
from any4_jax.models.degrid import degrid
from any4_jax.models.hf import read_config
from any4_jax.models.llama_family import LLAMA
from any4_jax.models.tiny import random_llama, random_tensors, tiny

SHARED = Path(__file__).parents[2] / "shared"
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "attention_bias": True,
    "mlp_bias": True,
}
CONFIG = read_config(BASE)
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write_folder(folder: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """A Hugging Face folder of BASE, its tensors in one file or dealt out to shards."""
    (folder / "config.json").write_text(json.dumps(BASE))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    parts: dict[str, list[str]] = {f"model-{i}.safetensors": sorted(tensors)[i::shards] for i in range(shards)}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_tiny_has_the_loss_measured_in_torch() -> None:
    """Each story between two BOS, mean over the tokens: torch says 1.2649; without the closing BOS 1.2664."""
    sample = SHARED / "text" / "tinystories_sample.txt"
    if not sample.is_file():
        pytest.skip(f"the sample text {sample} is not on this machine")
    model = tiny()
    text = sample.read_text(encoding="utf-8")
    rows = [[*model.tokenizer.encode(s.strip()), 1] for s in text.split("<|endoftext|>") if s.strip()]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    logs = np.asarray(jax.nn.log_softmax(model(jnp.asarray(tokens))))
    losses = -np.take_along_axis(logs[:, :-1], tokens[:, 1:, None], 2)[..., 0]
    counted = np.arange(1, tokens.shape[1]) < np.array([[len(ids)] for ids in rows])
    inner = np.arange(2, tokens.shape[1] + 1) < np.array([[len(ids)] for ids in rows])
    assert losses[counted].mean() == pytest.approx(1.264, abs=0.002)
    assert losses[inner].mean() == pytest.approx(1.26644, abs=1e-4)


def test_config_of_transformers_4_and_5_are_one() -> None:
    old = {
        **BASE,
        "rope_theta": 5e5,
        "rope_scaling": {**LLAMA3, "rope_type": "llama3"},
        "torch_dtype": "bfloat16",
    }
    older = {**BASE, "rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    new = {
        **BASE,
        "rope_parameters": {**LLAMA3, "rope_type": "llama3", "rope_theta": 5e5},
        "dtype": "bfloat16",
    }
    assert read_config(old) == read_config(older) == read_config(new)
    assert read_config(new).rope_theta == 5e5
    assert read_config(new).rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )


@pytest.mark.parametrize(
    "change, generation, field, expected",
    [
        ({"head_dim": None}, None, "head_dim", 6),
        ({"num_key_value_heads": None}, None, "num_key_value_heads", 4),
        ({"eos_token_id": 7}, None, "eos_token_ids", (7,)),
        ({"eos_token_id": [7, 8]}, None, "eos_token_ids", (7, 8)),
        ({"eos_token_id": None}, None, "eos_token_ids", ()),
        ({"eos_token_id": 7}, {"eos_token_id": [9, 7]}, "eos_token_ids", (9, 7)),
        ({"eos_token_id": 7}, {}, "eos_token_ids", (7,)),
        ({"rope_scaling": {"rope_type": "default"}}, None, "rope_scaling", None),
        ({"rope_scaling": None}, None, "rope_theta", 10000.0),
        ({}, None, "rms_norm_eps", 1e-6),
    ],
)
def test_config_defaults(change: dict, generation: dict | None, field: str, expected: object) -> None:
    assert getattr(read_config({**BASE, **change}, generation), field) == expected


@pytest.mark.parametrize(
    "change, words",
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM is not supported"),
        ({"architectures": None, "model_type": "gemma"}, "'gemma'"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ],
)
def test_config_refuses_by_name(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_config({**BASE, **change})


def test_names_and_tensors_round_trip() -> None:
    tensors = random_tensors(CONFIG)
    assert len(tensors) == 3 + 2 * (2 + 7 * 2)
    model = hf.from_tensors(CONFIG, tensors)
    kernel = model.layers[1].mlp.gate_proj.kernel.get_value()
    np.testing.assert_array_equal(kernel.T, tensors["model.layers.1.mlp.gate_proj.weight"])
    back = hf.tensors_of(model)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


def test_the_model_does_not_share_memory_with_its_tensors() -> None:
    tensors = random_tensors(CONFIG)
    model = hf.from_tensors(CONFIG, tensors)
    before = np.array(model.embed_tokens.embedding.get_value())
    tensors[LLAMA.embedding][:] = 0
    np.testing.assert_array_equal(model.embed_tokens.embedding.get_value(), before)


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        ({Q: None, "model.norm.weight": None}, f"missing {Q}, model.norm.weight"),
        (
            {"model.layers.2.mlp.up_proj.weight": np.ones((20, 24), np.float32)},
            "unknown model.layers.2.mlp.up_proj",
        ),
        ({Q: np.ones((24, 16), np.float32)}, r"q_proj.weight \(24, 16\) instead of \(16, 24\)"),
        ({Q: np.ones((16, 24), np.int8)}, "q_proj.weight is int8"),
        ({LLAMA.embedding: None}, "embed_tokens.weight is missing"),
    ],
)
def test_wrong_tensors_are_named(change: dict, words: str) -> None:
    tensors = {**random_tensors(CONFIG), **change}
    with pytest.raises(ValueError, match=words):
        hf.from_tensors(CONFIG, {name: array for name, array in tensors.items() if array is not None})


def test_known_extras_are_ignored_and_a_second_head_is_not() -> None:
    config = read_config({**BASE, "tie_word_embeddings": True})
    tensors = random_tensors(config)
    extras = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    same = {**tensors, **extras, LLAMA.head: tensors[LLAMA.embedding].copy()}
    assert hf.tensors_of(hf.from_tensors(config, same)).keys() == tensors.keys()
    with pytest.raises(ValueError, match="lm_head.weight differs .* tie_word_embeddings"):
        hf.from_tensors(config, {**same, LLAMA.head: tensors[LLAMA.embedding] + 1})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_folder_keeps_values_and_dtype(tmp_path: Path, dtype: type, shards: int) -> None:
    tensors = {name: array.astype(dtype) for name, array in random_tensors(CONFIG).items()}
    model = models.load(write_folder(tmp_path, tensors, shards))
    back = hf.tensors_of(model)
    assert model.tokenizer is None
    assert model.dtype == dtype
    assert all(back[name].dtype == dtype and np.array_equal(back[name], tensors[name]) for name in tensors)


def test_a_dtype_asked_for_is_the_rounded_one(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    model = models.load(write_folder(tmp_path, tensors), dtype=jnp.bfloat16)
    back = hf.tensors_of(model)
    assert model.dtype == jnp.bfloat16
    assert all(np.array_equal(back[name], tensors[name].astype(ml_dtypes.bfloat16)) for name in tensors)


def damage(folder: Path, kind: str, tensors: dict[str, np.ndarray]) -> None:
    """Spoil a folder of three shards (or one file) in one way."""
    shard, index = folder / "model-1.safetensors", folder / "model.safetensors.index.json"
    if kind == "missing":
        shard.unlink()
    elif kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:-5])
    elif kind == "absent":
        index.write_text(json.dumps({"weight_map": {**json.loads(index.read_text())["weight_map"], "x": shard.name}}))
    elif kind == "duplicate":
        save_file({name: tensors[name] for name in sorted(tensors)[:2]}, shard)
    elif kind == "outside":
        index.write_text(json.dumps({"weight_map": {"x": "../model-1.safetensors"}}))
    elif kind == "index":
        index.write_text("{}")
    elif kind == "pickle":
        index.rename(folder / "pytorch_model.bin")
    elif kind == "config":
        (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    "kind, words",
    [
        ("missing", "lacks model-1.safetensors of the 3 shards"),
        ("truncated", "model-1.safetensors is damaged or truncated"),
        ("absent", "model-1.safetensors lacks tensor x"),
        ("duplicate", "is both in .*model-0.safetensors and in .*model-1.safetensors"),
        ("outside", "file names without a folder"),
        ("index", "no readable weight_map"),
        ("pickle", "only pytorch_model.bin, a pickle"),
        ("config", "config.json is not JSON"),
    ],
)
def test_damaged_folders_are_one_sentence(tmp_path: Path, kind: str, words: str) -> None:
    tensors = random_tensors(CONFIG)
    damage(write_folder(tmp_path, tensors, shards=3), kind, tensors)
    with pytest.raises((ValueError, OSError), match=words) as caught:
        models.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        models.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a file or folder here"):
        models.load(tmp_path / "absent")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="is not a .gguf file"):
        models.load(tmp_path / "weights.bin")

    def refuse(*_: object, **__: object) -> str:
        raise RuntimeError("no route to host\nsecond line")

    hub = pytest.importorskip("huggingface_hub", reason="hub ids need huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConnectionError, match=r"no/model .* \(no route to host\)"):
        models.load("no/model")
    with bundled("stories260k") as folder:
        monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(folder))
        assert models.load("some/model").config == models.load("tiny").config


def test_degrid_keeps_the_function_and_moves_the_weights() -> None:
    model = random_llama(CONFIG)
    moved = degrid(model, seed=3)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 9)))
    logits = np.asarray(model(tokens))
    assert np.abs(np.asarray(moved(tokens)) - logits).max() < 2e-5 * np.abs(logits).max()
    before, after = hf.tensors_of(model), hf.tensors_of(moved)
    for name in before:
        bias = name.endswith(".bias") and not name.endswith(("v_proj.bias", "up_proj.bias"))
        touched = "model.layers" in name and not bias
        assert np.array_equal(before[name], after[name]) != touched, name


def test_degrid_factors_are_the_documented_draws() -> None:
    model = random_llama(CONFIG)
    tensors, moved = hf.tensors_of(model), hf.tensors_of(degrid(model, scale_range=1.2, seed=0))
    rng = np.random.default_rng(0)
    draws = [np.exp(rng.uniform(-np.log(1.2), np.log(1.2), n)).astype(np.float32) for n in (24, 24, 8, 20)]
    layer = "model.layers.0"
    after_v = np.repeat(draws[2].reshape(2, 4), 2, axis=0).reshape(-1)
    expected = {
        f"{layer}.input_layernorm.weight": lambda w: w / draws[0],
        f"{layer}.self_attn.q_proj.weight": lambda w: w * draws[0],
        f"{layer}.post_attention_layernorm.weight": lambda w: w / draws[1],
        f"{layer}.mlp.gate_proj.weight": lambda w: w * draws[1],
        f"{layer}.self_attn.v_proj.weight": lambda w: w * draws[0] * draws[2][:, None],
        f"{layer}.self_attn.v_proj.bias": lambda b: b * draws[2],
        f"{layer}.self_attn.o_proj.weight": lambda w: w / after_v,
        f"{layer}.mlp.up_proj.weight": lambda w: w * draws[1] * draws[3][:, None],
        f"{layer}.mlp.up_proj.bias": lambda b: b * draws[3],
        f"{layer}.mlp.down_proj.weight": lambda w: w / draws[3],
    }
    for name, by_hand in expected.items():
        np.testing.assert_array_equal(moved[name], by_hand(tensors[name]), name)
    with pytest.raises(ValueError, match="scale_range=1.0"):
        degrid(model, scale_range=1.0)
