"""Statistics in files: they come back bit for bit, what is no such file is refused, and the commands pass them on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from any4_jax import statistics
from any4_jax.cli import main
from any4_jax.cli.errors import WorkError
from any4_jax.models.tiny import random_llama, tiny
from any4_jax.statistics import AbsMax, Drift, Gathered, Hessian, Largest, Moments, Sample
from any4_jax.walk import calibrate

K = 6


@pytest.fixture(scope="module")
def stats() -> dict[str, Gathered]:
    """Of two linears that share an input, and of a stack of experts."""
    x = np.random.default_rng(0).standard_normal((9, K)).astype(np.float32)
    shared = statistics.from_activations(x, statistics=(Moments(), Hessian(), Sample(4), Largest(3), Drift()))
    routed = np.arange(2 * 9).reshape(2, 9) % 3 > 0
    experts = statistics.update(statistics.empty(K, (AbsMax(), Moments()), experts=2), x, routed=routed)
    return {"q_proj": shared, "k_proj": shared, "experts": experts}


def equal(a: Any, b: Any) -> bool:
    """Whether two trees have one structure and the same bytes."""
    leaves = jax.tree.leaves(a), jax.tree.leaves(b)
    same = (x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(*leaves, strict=False))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(same)


def test_statistics_come_back_bit_for_bit_and_shared(stats, tmp_path: Path) -> None:
    file = tmp_path / "stats.safetensors"
    statistics.save(file, stats)
    again = statistics.load(file)
    assert list(again) == list(stats) and equal(again, stats)
    assert again["q_proj"] is again["k_proj"] and again["experts"].stack == (2,)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    size = sum(leaf.nbytes for path in ("q_proj", "experts") for leaf in jax.tree.leaves(stats[path]))
    assert size < file.stat().st_size < size + 4000


def _flipped(raw: bytes) -> bytes:
    return raw[:-1] + bytes([raw[-1] ^ 1])


def _without_description(raw: bytes) -> bytes:
    return safetensors.numpy.save(safetensors.numpy.load(raw))


@pytest.mark.parametrize(
    "change, words",
    [
        (_flipped, "is not as it was written: its sha256 differs; calibrate again"),
        (lambda raw: raw[:-4], "is no file of statistics, or is damaged"),
        (lambda raw: b"PK", "of 2 bytes is no file of statistics"),
        (_without_description, "holds no statistics, and those of a model's inputs are needed"),
    ],
)
def test_files_of_other_things_are_refused(stats, change, words: str, tmp_path: Path) -> None:
    file = tmp_path / "stats.safetensors"
    statistics.save(file, stats)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=words):
        statistics.load(file)


@pytest.mark.parametrize(
    "old, new, words",
    [
        ('"k":6', '"k":7', r"Moments of q_proj has float32 \[3, 6\] where float32 \[3, 7\] is needed"),
        ('"Hessian"', '"Other"', "statistics of the kind Other, which any4_jax.statistics.CATALOGUE lacks; import"),
        ('"tokens":4', '"tokens":true', "holds Sample with other fields"),
        ('"tokens":4', '"tokens":5', r"Sample of q_proj has float32 \[4, 6\] where float32 \[5, 6\] is needed"),
        ('"tokens":4', '"many":4', "holds Sample with other fields"),
        ('"linears":["experts"]', '"linears":[]', "inputs.1.linears"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(stats, old: str, new: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "stats.safetensors"
    statistics.save(file, stats)
    arrays = safetensors.numpy.load_file(file)
    with safetensors.safe_open(file, framework="numpy") as opened:
        text = opened.metadata()["statistics"]
    assert old in text
    text = text.replace(old, new)
    digest = statistics.files._digest(text, arrays)
    safetensors.numpy.save_file(arrays, file, {"statistics": text, "sha256": digest})
    with pytest.raises(ValueError, match=words):
        statistics.load(file)


def test_only_what_the_catalogue_has_is_saved(tmp_path: Path, monkeypatch) -> None:
    class Other(AbsMax):
        pass

    mine = {"a": Gathered({Other(): np.ones(K, np.float32)}, K)}
    with pytest.raises(ValueError, match="got statistics of the kind Other, and files hold those of"):
        statistics.save(tmp_path / "stats", mine)
    with pytest.raises(ValueError, match="got no statistics to write"):
        statistics.save(tmp_path / "stats", {})
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(statistics.CATALOGUE, "Other", Other)
    statistics.save(tmp_path / "stats", mine)
    assert equal(statistics.load(tmp_path / "stats"), mine)


def test_the_commands_write_them_and_quantize_with_them(monkeypatch, tmp_path: Path, capsys) -> None:
    model = random_llama(dataclasses.replace(random_llama().config, num_hidden_layers=1, vocab_size=512))
    model.tokenizer = tiny().tokenizer
    monkeypatch.setattr("any4_jax.models.load", lambda name: model)
    file, text = tmp_path / "stats", tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cat. " * 9)
    assert main(["calibrate", "small", f"{file}", "--text", f"{text}", "--hessian", "--seqlen", "64"]) == 0
    found = statistics.load(file)
    assert equal(found, calibrate(model, text.read_text(), also=(Hessian(),), seqlen=64))
    tokens = len(model.tokenizer.encode(text.read_text()))
    assert f"8 layers read 5 inputs, of {tokens} tokens each" in capsys.readouterr().out
    taken = {}

    def quantize(model, method, **settings):
        taken.update(settings)
        raise WorkError("far enough")

    monkeypatch.setattr("any4_jax.cli.quantize.quantize_model", quantize)
    argv = ["quantize", "small", f"{tmp_path}/out", "--statistics", f"{file}"]
    assert main(argv) == 1 and "far enough" in capsys.readouterr().err
    assert equal(taken["stats"], found) and taken["data"] is None
    for flags in (["--calibrate", "prompt"], ["--samples", "2"], ["--seqlen", "8"], ["--search-results", "x"]):
        assert main([*argv, *flags]) == 2
        assert f"got --statistics and {flags[0]}, and they say the same twice" in capsys.readouterr().err
    assert main([*argv, "--cache", "kvquant"]) == 2
    assert main(["calibrate", "small", f"{file}", "--method", "tune"]) == 2
    assert "got --method tune, which runs whole blocks on a text" in capsys.readouterr().err
    assert main(["calibrate", "small", f"{tmp_path}/none/stats"]) == 1
    assert "its folder is missing; create it first" in capsys.readouterr().err
