"""Hugging Face names, tensors, folders; the tiny model."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hf_folders import BASE, CONFIG, write_folder
from safetensors.numpy import save_file

from any4_jax import models
from any4_jax.data import bundled
from any4_jax.models import hf
from any4_jax.models.hf import read_config
from any4_jax.models.llama_family import LLAMA
from any4_jax.models.tiny import random_tensors, tiny

SHARED = Path(__file__).parents[2] / "shared"


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
        ("truncated", "model-1.safetensors of .* bytes is damaged or truncated"),
        ("absent", "model-1.safetensors lacks tensor 'x'"),
        ("duplicate", "is both in .*model-0.safetensors and in .*model-1.safetensors"),
        ("outside", "file names without a folder"),
        ("index", "index.json lacks weight_map"),
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
