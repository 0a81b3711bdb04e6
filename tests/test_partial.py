"""Resumed quantization: nothing is done twice or left behind, and `any4 quantize` survives kill -9."""

import functools
import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_same
from flax import nnx

from any4_jax import statistics
from any4_jax.checkpoint.partial import PartialStore
from any4_jax.cli import main
from any4_jax.methods import NF4, Int, matrices
from any4_jax.models.config import LlamaConfig
from any4_jax.models.tiny import random_llama
from any4_jax.surgery import linears, quantized_leaves
from any4_jax.walk import quantize_model

METHOD = Int(group_size=16)
# All of its matrices are 32 x 32: one program a method, where compiling is most of a test's time.
SQUARE = LlamaConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    max_position_embeddings=64,
)


@functools.cache
def drawn(seed):
    return random_llama(SQUARE, seed)


def small(seed=0):
    """A model of one's own to change: a clone takes a fiftieth of the time."""
    return nnx.clone(drawn(seed))


PATHS = sorted(path for path in linears(small()) if path != "lm_head")
TOTAL = len(PATHS)


class Killed(BaseException):
    """Stands for the end of a process: nothing catches it."""


@pytest.fixture
def computed(monkeypatch):
    """The paths of the layers that are computed; `computed.limit` is the number after which the run is killed."""

    class Computed(list):
        limit: int | None = None

    paths, lock, real = Computed(), threading.Lock(), matrices.quantize_matrix

    def counting(layer, method, stats, path):
        with lock:
            if paths.limit is not None and len(paths) >= paths.limit:
                raise Killed
            paths.append(path)
        return real(layer, method, stats, path)

    monkeypatch.setattr(matrices, "quantize_matrix", counting)
    return paths


def quantized(folder, model=None, method=METHOD, stats=None, **options):
    with PartialStore(folder, **options) as finished:
        new = quantize_model(model or small(), method, stats=stats, finished=finished)
    return new, finished.reused


def made_up(k, seed=0):
    """Statistics for K = k inputs, of host arrays: nothing is compiled for them."""
    sums = np.random.default_rng(seed).uniform(1, 2, (3, k)).astype(np.float32)
    moments = statistics.MomentSums(np.int32(4), sums, np.zeros_like(sums))
    return statistics.Gathered({statistics.Moments(): moments, statistics.AbsMax(): sums[0]}, k)


def gathered(model, seed=0):
    return {path: made_up(layer.in_features, seed) for path, layer in linears(model).items()}


@pytest.mark.parametrize("limit", [0, 1, 5, TOTAL - 1, TOTAL])
def test_an_interrupted_run_continues_where_it_was(limit, tmp_path, computed) -> None:
    folder, model = tmp_path / "partial", small()
    stats, seen = gathered(model), []
    computed.limit = limit
    if limit < TOTAL:
        with pytest.raises(Killed):
            quantized(folder, model, stats=stats)
    else:
        quantized(folder, model, stats=stats)
    first = list(computed)
    assert len(first) == limit and folder.exists() == (limit > 0)

    computed.limit = None
    with PartialStore(folder) as finished:
        new = quantize_model(model, METHOD, stats=stats, finished=finished, progress=lambda *step: seen.append(step))
    assert finished.reused == limit
    assert sorted(computed) == PATHS  # each layer once over both runs
    assert [step[:2] for step in seen] == [(i + 1, TOTAL) for i in range(TOTAL)]
    assert {path for *_, path in seen[:limit]} == set(first)
    whole = quantize_model(model, METHOD, stats=stats)
    assert list(quantized_leaves(new)) == list(quantized_leaves(whole)) and new.recipe == whole.recipe
    assert_same(nnx.state(new), nnx.state(whole))


def test_what_is_not_of_the_weight_comes_from_the_model(tmp_path) -> None:
    class Net(nnx.Module):
        def __init__(self, bias):
            ones = {"kernel_init": lambda *shape: np.ones(shape[1], np.float32), "rngs": nnx.Rngs(0)}
            self.a = nnx.Linear(32, 32, dtype=jnp.bfloat16, bias_init=lambda *_: np.full(32, bias, np.float32), **ones)
            self.b = nnx.Linear(32, 32, use_bias=False, **ones)

    quantized(tmp_path / "partial", Net(1.0))
    new, reused = quantized(tmp_path / "partial", Net(2.0))
    assert reused == 2
    np.testing.assert_array_equal(new.a.bias[...], np.full(32, 2.0))
    assert (new.a.dtype, new.b.bias, new.b.dtype) == (jnp.bfloat16, None, None)


def test_plain_trees(tmp_path, rng, computed) -> None:
    """Keys of a tree may be no names of files; one matrix under two names is two layers."""
    square = jnp.asarray(rng.normal(size=(32, 32)), jnp.bfloat16)
    tree = {"a/../b": {"kernel": square}, "x" * 400: [{"weight": square}], "norm": {"weight": jnp.ones(32)}}
    first, _ = quantized(tmp_path / "partial", tree)
    second, reused = quantized(tmp_path / "partial", tree)
    assert (reused, len(computed), len(list(tmp_path.rglob("*")))) == (2, 2, 3)
    assert_same(first, second)
    assert_same(second, quantize_model(tree, METHOD))


def changed_weight(model):
    kernel = linears(model)["layers.0.mlp.up_proj"].kernel
    kernel[...] = kernel[...].at[0, 0].add(jnp.finfo(kernel.dtype).eps)


@pytest.mark.parametrize(
    ("change", "reused"),
    [
        ({}, TOTAL),
        ({"method": Int(bits=3, group_size=16)}, 0),
        ({"method": NF4(group_size=16)}, 0),
        ({"stats": 1}, 0),
        ({"model": 1}, 0),
        ({"model": "one weight"}, TOTAL - 1),
        ({"resume": False}, 0),
    ],
    ids=str,
)
def test_what_has_changed_is_not_reused(change, reused, tmp_path) -> None:
    def arguments(model=0, method=METHOD, stats=0, resume=True):
        net = small(seed=model if model == 1 else 0)
        if model == "one weight":
            changed_weight(net)
        return {
            "model": net,
            "method": method,
            "stats": None if stats is None else gathered(net, stats),
            "resume": resume,
        }

    quantized(tmp_path / "partial", **arguments())
    given = arguments(**change)
    new, count = quantized(tmp_path / "partial", **given)
    assert count == reused
    assert_same(nnx.state(new), nnx.state(quantize_model(given["model"], given["method"], stats=given["stats"])))
    # What was of no use has been replaced: the same arguments find all of it.
    assert quantized(tmp_path / "partial", **given | {"resume": True})[1] == TOTAL


def test_a_file_under_another_layers_name_is_no_layer(tmp_path, computed) -> None:
    folder = tmp_path / "partial"
    whole, _ = quantized(folder)
    one, other, *_ = sorted(folder.iterdir())
    raw = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(raw)
    computed.clear()
    new, reused = quantized(folder)
    assert (reused, len(computed)) == (TOTAL - 2, 2)
    assert_same(nnx.state(new), nnx.state(whole))


def test_only_our_files_are_removed(tmp_path) -> None:
    folder = tmp_path / "partial"
    quantized(folder)
    cut = next(folder.iterdir()).name + ".0123456789ab.tmp"
    (folder / cut).write_bytes(b"cut short")
    (folder / "unit-notes.txt").write_text("mine")
    with PartialStore(folder) as finished:
        assert not (folder / cut).exists()
        finished.clear()
    assert [path.name for path in folder.iterdir()] == ["unit-notes.txt"]
    (folder / "unit-notes.txt").unlink()
    with PartialStore(folder) as finished:
        finished.clear()
    assert not folder.exists()


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and ";" in text
    return text


def test_a_place_that_can_not_be_written_is_one_sentence(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    for place in ("file", "missing/partial"):
        with pytest.raises(OSError) as error, PartialStore(tmp_path / place):
            pass
        assert place in one_sentence(error)
    with PartialStore(tmp_path / "partial") as finished:
        with pytest.raises(OSError) as error, PartialStore(tmp_path / "partial"):
            pass
        assert "another run" in one_sentence(error)
        (tmp_path / "partial").rmdir()
        with pytest.raises(OSError) as error:
            quantize_model(small(), METHOD, finished=finished)
        assert "can't keep results" in one_sentence(error)
    with PartialStore(tmp_path / "partial"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


KILL = """
import os, signal, sys, threading
from any4_jax.cli import main
from any4_jax.methods import matrices
real, lock, count = matrices.quantize_matrix, threading.Lock(), iter(range(1000))
def killing(*layer):
    with lock:
        if next(count) == 12:
            os.kill(os.getpid(), signal.SIGKILL)
    return real(*layer)
matrices.quantize_matrix = killing
main(sys.argv[1:])
"""


def test_the_command_survives_kill_9_and_no_resume_starts_afresh(tmp_path, computed, capsys) -> None:
    text, out, whole = tmp_path / "text.txt", tmp_path / "out", tmp_path / "whole"
    text.write_text("Once upon a time there was a little girl who had a red ball.")
    # The attention's matrices have two shapes, so two programs; the statistics of the second run equal the first's.
    fields = ["--method", "int", "--group-size", "32", "--calibrate", str(text), "--rules", ".*mlp.*=none"]
    command = ["quantize", "tiny", f"{out}/", *fields]
    root = Path(__file__).resolve().parent.parent
    ended = subprocess.run([sys.executable, "-c", KILL, *command], cwd=root, capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    left = len(list((tmp_path / "out.partial").glob("unit-*.safetensors")))
    assert 10 <= left <= 12 and not out.exists()  # two threads: the one that was at work loses its layer

    shutil.copytree(tmp_path / "out.partial", tmp_path / "whole.partial")

    assert main(command) == 0
    assert len(computed) == 20 - left
    assert f"resuming: {left} of 20 layers were done before" in capsys.readouterr().err.splitlines()
    computed.clear()
    assert main(["quantize", "tiny", str(whole), "--no-resume", *fields]) == 0
    assert len(computed) == 20
    assert "resuming" not in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt", "whole"]
    arrays = [json.loads((folder / "any4.json").read_text())["arrays"] for folder in (out, whole)]
    assert arrays[0] == arrays[1]


def test_a_failed_command_leaves_nothing_and_names_the_place(tmp_path, capsys) -> None:
    command = ["quantize", "tiny", str(tmp_path / "out"), "--method", "int", "--calibrate", "none"]
    assert main([*command, "--rules", "nothing=nf4"]) == 1
    assert not list(tmp_path.iterdir())
    (tmp_path / "out.partial").write_text("x")
    capsys.readouterr()
    assert main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("any4: error: can't keep results in") and "out.partial" in line
    assert (tmp_path / "out.partial").read_text() == "x"
