"""The store of finished layers: what is of another layer, version or platform, or damaged, is not believed."""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_same
from test_partial import METHOD, made_up

from any4_jax.checkpoint import partial
from any4_jax.checkpoint.partial import PartialStore
from any4_jax.methods import MX4, NF4, Any4, Int, Result, quantize
from any4_jax.methods.matrices import Matrix, job_key
from any4_jax.statistics import Gathered, Moments
from any4_jax.weights import PermuteInput, QuantizeInput, ScaleInput, Sum


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """(folder, path, key, bytes of the file) of a store that holds one layer."""
    folder = tmp_path_factory.mktemp("kept") / "partial"
    w = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    with PartialStore(folder) as finished:
        finished.put("a.b", "key", Result(quantize(w, METHOD)))
    (file,) = folder.iterdir()
    return folder, "a.b", "key", file.read_bytes()


def found(kept, raw: bytes):
    """What a store gives whose file holds `raw`."""
    folder, path, key, _ = kept
    (file,) = folder.iterdir()
    file.write_bytes(raw)
    with PartialStore(folder) as finished:
        return finished.get(path, key)


@pytest.mark.parametrize("change", [{"any4_jax": "0.0.1"}, {"jax": "0.0.1"}, {"platform": "gpu"}], ids=str)
def test_what_another_version_or_platform_made_is_not_reused(change, kept, monkeypatch) -> None:
    assert found(kept, kept[3]) is not None
    library = partial._library() | change
    monkeypatch.setattr(partial, "_library", lambda: library)
    assert found(kept, kept[3]) is None


def test_the_key_tells_dtype_and_shape_from_bytes(rng) -> None:
    w = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    alike = [w, w.reshape(4, 8), jax.lax.bitcast_convert_type(w, jnp.int32), w.astype(jnp.bfloat16)]
    assert len({job_key(Matrix(x, False), METHOD, None) for x in alike}) == 4
    assert job_key(Matrix(w, False), METHOD, None) == job_key(Matrix(np.asarray(w), False), Int(group_size=16), None)
    assert job_key(Matrix(w, False), METHOD, None) != job_key(Matrix(w, True), METHOD, None)


def test_the_key_tells_methods_and_statistics(rng) -> None:
    w = Matrix(rng.normal(size=(8, 4)), False)
    fields = [{}, {"bits": 3}, {"group_size": 16}, {"symmetric": True}, {"scale_dtype": "float16"}]
    methods = [cls(**given) for cls in (Int, Any4) for given in fields] + [NF4(), MX4()]
    longer = Gathered({Moments(): dataclasses.replace(made_up(4)[Moments()], count=np.int32(5))}, 4)
    stats = [None, made_up(4), made_up(4, 1), longer]
    assert len({job_key(w, method, seen) for method in methods for seen in stats}) == len(methods) * len(stats)


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


OPERATORS = ("planes", "exponents", "row table", "scales quantized", "sum", "permuted", "input", "input levels")


@functools.cache
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


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_comes_back_as_it_was(name, tmp_path) -> None:
    operator = operators()[name]
    with PartialStore(tmp_path / "partial") as finished:
        finished.put("x", "key", Result(operator, {"ratio": 0.25, "from": "a search", "tried": (1, 2)}))
        result = finished.get("x", "key")
        assert finished.get("x", "other") is finished.get("y", "key") is None
    assert finished.reused == 1
    assert result.notes == {"ratio": 0.25, "from": "a search", "tried": (1, 2)}
    assert type(result.operator) is type(operator)
    assert_same(result.operator, operator)


def test_what_a_site_changed_comes_back_by_name(tmp_path) -> None:
    changed = {"a.kernel": operators()["sum"], "norm.scale": jnp.arange(6, dtype=jnp.bfloat16)}
    notes = {"a": {"alpha": 0.5}, "b": {}}
    with PartialStore(tmp_path / "partial") as finished:
        finished.put("layers.0.mlp_in", "key", Result(changed, notes))
        result = finished.get("layers.0.mlp_in", "key")
    assert finished.reused == 2, "of the two linears"
    assert result.notes == notes
    assert_same(result.operator, changed)


def test_many_threads(tmp_path) -> None:
    """Layers of their own, and one that all write: a reader gets one of those put, whole, or none."""
    w = np.random.default_rng(4).normal(size=(8, 6, 32)).astype(np.float32)
    made = [Result(quantize(x, METHOD)) for x in w]
    with PartialStore(tmp_path / "partial") as finished, ThreadPoolExecutor(8) as pool:

        def work(i):
            for _ in range(5):
                finished.put(f"layer{i}", "key", made[i])
                finished.put("shared", "key", made[i])
                assert_same(finished.get(f"layer{i}", "key").operator, made[i].operator)
                seen = finished.get("shared", "key").operator
                assert any(
                    np.array_equal(seen.codes, one.operator.codes) and np.array_equal(seen.scales, one.operator.scales)
                    for one in made
                )

        list(pool.map(work, range(8)))
        assert finished.reused == 80
    assert len(list((tmp_path / "partial").iterdir())) == 9
