"""Resumed quantization: what is done is not done again, what could be wrong is not believed, nothing is left behind."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from any4_jax import statistics
from any4_jax.checkpoint import partial
from any4_jax.checkpoint.partial import PartialStore
from any4_jax.cli import main
from any4_jax.methods import MX4, NF4, Any4, Int, quantize
from any4_jax.models.config import LlamaConfig
from any4_jax.models.tiny import random_llama
from any4_jax.surgery import Matrix, layer_key, layers, linears, quantize_model, quantized_leaves
from any4_jax.weights import PermuteInput, QuantizeInput, ScaleInput, Sum

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


def small(seed=0):
    return random_llama(SQUARE, seed)


PATHS = sorted(path for path in linears(small()) if path != "lm_head")
TOTAL = len(PATHS)


class Killed(BaseException):
    """Stands for the end of a process: nothing catches it."""


@pytest.fixture
def computed(monkeypatch):
    """The paths of the layers that are computed; `computed.limit` is the number after which the run is killed."""

    class Computed(list):
        limit: int | None = None

    paths, lock, real = Computed(), threading.Lock(), layers.quantize_matrix

    def counting(layer, method, stats, path):
        with lock:
            if paths.limit is not None and len(paths) >= paths.limit:
                raise Killed
            paths.append(path)
        return real(layer, method, stats, path)

    monkeypatch.setattr(layers, "quantize_matrix", counting)
    return paths


def quantized(folder, model=None, method=METHOD, stats=None, **options):
    with PartialStore(folder, **options) as finished:
        new = quantize_model(model or small(), method, stats=stats, finished=finished)
    return new, finished.reused


def made_up(k, seed=0):
    """Statistics for K = k inputs, of host arrays: nothing is compiled for them."""
    sums = np.random.default_rng(seed).uniform(1, 2, (3, k)).astype(np.float32)
    return dataclasses.replace(statistics.empty(k), count=np.int32(4), sums=sums, absmax=sums[0])


def gathered(model, seed=0):
    return {path: made_up(layer.in_features, seed) for path, layer in linears(model).items()}


def assert_same(a, b):
    """The same structure, dtypes and bytes."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """(folder, path, key, bytes of the file) of a store that holds one layer."""
    folder = tmp_path_factory.mktemp("kept") / "partial"
    w = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    with PartialStore(folder) as finished:
        finished.put("a.b", "key", quantize(w, METHOD))
    (file,) = folder.iterdir()
    return folder, "a.b", "key", file.read_bytes()


def found(kept, raw: bytes):
    """What a store gives whose file holds `raw`."""
    folder, path, key, _ = kept
    (file,) = folder.iterdir()
    file.write_bytes(raw)
    with PartialStore(folder) as finished:
        return finished.get(path, key)


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


@pytest.mark.parametrize("change", [{"any4_jax": "0.0.1"}, {"jax": "0.0.1"}, {"platform": "gpu"}], ids=str)
def test_what_another_version_or_platform_made_is_not_reused(change, kept, monkeypatch) -> None:
    assert found(kept, kept[3]) is not None
    library = partial._library() | change
    monkeypatch.setattr(partial, "_library", lambda: library)
    assert found(kept, kept[3]) is None


def test_the_key_tells_dtype_and_shape_from_bytes(rng) -> None:
    w = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    alike = [w, w.reshape(4, 8), jax.lax.bitcast_convert_type(w, jnp.int32), w.astype(jnp.bfloat16)]
    assert len({layer_key(Matrix(x, False), METHOD, None) for x in alike}) == 4
    assert layer_key(Matrix(w, False), METHOD, None) == layer_key(
        Matrix(np.asarray(w), False), Int(group_size=16), None
    )
    assert layer_key(Matrix(w, False), METHOD, None) != layer_key(Matrix(w, True), METHOD, None)


def test_the_key_tells_methods_and_statistics(rng) -> None:
    w = Matrix(rng.normal(size=(8, 4)), False)
    fields = [{}, {"bits": 3}, {"group_size": 16}, {"symmetric": True}, {"scale_dtype": "float16"}]
    methods = [cls(**given) for cls in (Int, Any4) for given in fields] + [NF4(), MX4()]
    stats = [None, made_up(4), made_up(4, 1), dataclasses.replace(made_up(4), count=np.int32(5))]
    assert len({layer_key(w, method, seen) for method in methods for seen in stats}) == len(methods) * len(stats)


def test_a_flipped_byte_is_never_believed(kept) -> None:
    """Every byte of the arrays and, at each of a sample of places, of the header: at best it changes nothing."""
    raw = kept[3]
    whole = found(kept, raw)
    body = 8 + int.from_bytes(raw[:8], "little")
    sample = np.random.default_rng(1).integers(0, body, 60)
    for place in (*range(8), *sample, *range(body, len(raw), 7), len(raw) - 1):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << place % 8
        operator = found(kept, bytes(damaged))
        if operator is not None:
            assert place < body
            assert_same(operator, whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: b"",
        lambda raw: raw[:7],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: b"PK\x03\x04" + raw[4:],
        lambda raw: (2).to_bytes(8, "little") + b"{}",
        lambda raw: (16).to_bytes(8, "little") + b'{"__metadata__":',
        lambda raw: raw.replace(b'{\\"path\\"', b'[\\"path\\"'),
        lambda raw: raw.replace(b'\\"group_size\\": 16', b'\\"group_size\\": 32'),
        lambda raw: raw.replace(b"QuantizedTensor", b"QuantizedTensoy"),
    ],
)
def test_a_damaged_or_foreign_file_is_no_layer(kept, change) -> None:
    assert found(kept, kept[3]) is not None
    raw = change(kept[3])
    assert raw != kept[3] and found(kept, raw) is None


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


def operators():
    w = np.random.default_rng(3).normal(size=(6, 40)).astype(np.float32)
    leaf = quantize(w, METHOD)
    scale = jnp.asarray(w[0], jnp.float16)
    return {
        "planes": quantize(w, Int(bits=3, group_size=16)),
        "exponents": quantize(w, MX4()),
        "row table": dataclasses.replace(leaf, lut=jnp.tile(leaf.lut, (6, 1)).astype(jnp.float32)),
        "scales quantized": dataclasses.replace(leaf, scales=quantize(w[:, :3], Int(bits=8))),
        "sum": Sum((leaf, ScaleInput(leaf, scale))),
        "permuted": PermuteInput(leaf, jnp.arange(40, dtype=jnp.int32)[::-1]),
        "input": QuantizeInput(leaf, None, bits=8, symmetric=True, per="token"),
        "input levels": QuantizeInput(leaf, jnp.linspace(-1, 1, 16), bits=4, symmetric=True, per="tensor"),
    }


@pytest.mark.parametrize("name", operators())
def test_every_operator_comes_back_as_it_was(name, tmp_path) -> None:
    operator = operators()[name]
    with PartialStore(tmp_path / "partial") as finished:
        finished.put("x", "key", operator)
        again = finished.get("x", "key")
        assert finished.get("x", "other") is finished.get("y", "key") is None
    assert finished.reused == 1
    assert type(again) is type(operator)
    assert_same(again, operator)


def test_many_threads(tmp_path) -> None:
    """Layers of their own, and one that all write: a reader gets one of those put, whole, or none."""
    w = np.random.default_rng(4).normal(size=(8, 6, 32)).astype(np.float32)
    made = [quantize(x, METHOD) for x in w]
    with PartialStore(tmp_path / "partial") as finished, ThreadPoolExecutor(8) as pool:

        def work(i):
            for _ in range(5):
                finished.put(f"layer{i}", "key", made[i])
                finished.put("shared", "key", made[i])
                assert_same(finished.get(f"layer{i}", "key"), made[i])
                seen = finished.get("shared", "key")
                assert any(
                    np.array_equal(seen.codes, op.codes) and np.array_equal(seen.scales, op.scales) for op in made
                )

        list(pool.map(work, range(8)))
        assert finished.reused == 80
    assert len(list((tmp_path / "partial").iterdir())) == 9


def test_only_our_files_are_removed(tmp_path) -> None:
    folder = tmp_path / "partial"
    quantized(folder)
    cut = next(folder.iterdir()).name + ".0123456789ab.tmp"
    (folder / cut).write_bytes(b"cut short")
    (folder / "layer-notes.txt").write_text("mine")
    with PartialStore(folder) as finished:
        assert not (folder / cut).exists()
        finished.clear()
    assert [path.name for path in folder.iterdir()] == ["layer-notes.txt"]
    (folder / "layer-notes.txt").unlink()
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
        assert "can't keep finished layers" in one_sentence(error)
    with PartialStore(tmp_path / "partial"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


KILL = """
import os, signal, sys, threading
from any4_jax.surgery import layers
from any4_jax.cli import main
real, lock, count = layers.quantize_matrix, threading.Lock(), iter(range(1000))
def killing(*layer):
    with lock:
        if next(count) == 12:
            os.kill(os.getpid(), signal.SIGKILL)
    return real(*layer)
layers.quantize_matrix = killing
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
    left = len(list((tmp_path / "out.partial").glob("layer-*.safetensors")))
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
    assert line.startswith("any4: error: can't keep finished layers in") and "out.partial" in line
    assert (tmp_path / "out.partial").read_text() == "x"
