"""Checkpoints of models and trees: equal tokens, recipe and tokenizer, equal bits, no float weights, sharding."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_same
from flax import nnx
from new_process import run_python

from any4_jax import weights
from any4_jax.checkpoint import load, save, store
from any4_jax.generate import generate
from any4_jax.methods import NF4, Int, quantize
from any4_jax.models.llama import Llama
from any4_jax.models.tiny import random_llama, tiny
from any4_jax.surgery import linears, quantized_leaves
from any4_jax.walk import quantize_model
from any4_jax.weights import PermuteInput, QuantizeInput, ScaleInput, Sum

TOKENS = np.arange(6, dtype=np.int32)[None]


@pytest.fixture(scope="module")
def quantized() -> Llama:
    """Two methods, three widths, a layer left alone."""
    rules = [
        (r".*up_proj", Int(bits=3, group_size=16)),
        (r".*o_proj", Int(bits=8)),
        (r".*layers\.1\.mlp\.down.*", None),
    ]
    return quantize_model(random_llama(), NF4(group_size=16), rules=rules)


@pytest.fixture(scope="module")
def saved(quantized: Llama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    save(path, quantized)
    return path


def test_a_quantized_model_comes_back(quantized: Llama, saved: Path) -> None:
    back = load(saved)
    assert back.config == quantized.config and back.dtype == quantized.dtype
    assert back.recipe == quantized.recipe and hash(back.recipe) == hash(quantized.recipe)
    assert back.tokenizer is None
    assert nnx.split(back)[0] == nnx.split(quantized)[0]
    assert_same(nnx.state(back), nnx.state(quantized))
    np.testing.assert_array_equal(back(TOKENS), quantized(TOKENS))


@pytest.mark.slow
def test_text_and_tokenizer_come_back(tmp_path: Path) -> None:
    model = quantize_model(tiny(), NF4(group_size=32))
    save(tmp_path / "m", model)
    back = load(tmp_path / "m")
    assert back.tokenizer.files == model.tokenizer.files
    written = [generate(m, "Once upon a time", max_new_tokens=8) for m in (model, back)]
    assert written[0] == written[1]


def test_a_float_model_comes_back(tmp_path: Path) -> None:
    model = random_llama()
    save(tmp_path / "m", model)
    back = load(tmp_path / "m")
    assert back.recipe is None and set(linears(back)) == set(linears(model))
    assert_same(nnx.state(back), nnx.state(model))


def test_load_reads_and_makes_no_float_weights(quantized: Llama, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read holds no array of a quantized layer's size in floats, and no random weight is drawn."""
    asked: dict[str, jax.Array] = {}
    read = store.read

    def spy(*args, **kwargs):
        arrays, content, files = read(*args, **kwargs)
        asked.update(arrays)
        return arrays, content, files

    monkeypatch.setattr(store, "read", spy)
    monkeypatch.setattr(jax.random, "split", lambda *a, **k: pytest.fail("load drew random numbers"))
    load(saved)
    assert asked
    leaves = quantized_leaves(quantized)
    for path, weight in leaves.items():
        mine = [array for name, array in asked.items() if name.startswith(f"{path}.kernel/")]
        assert sum(array.nbytes for array in mine) == weight.nbytes
        assert all(a.dtype == jnp.uint8 or a.size < weight.shape[0] * weight.shape[1] for a in mine)
        assert f"{path}.kernel" not in asked
    rest = sum(a.nbytes for name, a in asked.items() if "/" not in name)
    assert rest == sum(a.nbytes for a in jax.tree.leaves(nnx.state(quantized, nnx.Param)))


def operators() -> dict:
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(6, 20)), jnp.float32)
    leaf, odd = quantize(w, NF4(group_size=8)), quantize(w, Int(bits=3, group_size=8))
    byte = quantize(w, Int(bits=8, group_size=8))
    double = dataclasses.replace(leaf, scales=quantize(leaf.scales, Int(bits=8, zero_point="float")))
    return {
        "Sum": Sum((leaf, odd, w)),
        "ScaleInput": ScaleInput(leaf, jnp.asarray(rng.uniform(size=20), jnp.float32)),
        "PermuteInput": PermuteInput(odd, jnp.asarray(rng.permutation(20), jnp.int32)),
        "QuantizeInput": QuantizeInput(byte, None, 8, False, "tensor"),
        "QuantizeInput by group": QuantizeInput(byte, None, 8, True, "group"),
        "QuantizeInput with levels": QuantizeInput(byte, jnp.linspace(-1, 1, 16), 4, True, "token"),
        "double": double,
        "six bits": quantize(w, Int(bits=6, group_size=8)),
        "nested": ScaleInput(Sum((PermuteInput(double, jnp.arange(20)[::-1]), odd)), jnp.ones(20, jnp.bfloat16)),
        "plain": {"kernel": w, "list": [jnp.arange(3), {"bias": jnp.ones(2, jnp.bfloat16)}]},
    }


def test_trees_of_operators_come_back_bit_by_bit(tmp_path: Path) -> None:
    tree = operators()
    save(tmp_path / "tree", tree)
    back = load(tmp_path / "tree")
    assert set(back) == set(tree)
    for name in tree:
        assert_same(back[name], tree[name])


def test_a_loaded_model_saves_the_same_checkpoint(saved: Path, tmp_path: Path) -> None:
    save(tmp_path / "again", load(saved))
    first, second = store.read_manifest(saved), store.read_manifest(tmp_path / "again")
    assert (first.arrays, first.content) == (second.arrays, second.content)


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from any4_jax.checkpoint import load
from any4_jax.surgery import quantized_leaves

assert len(jax.devices()) == 2
mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
whole = NamedSharding(mesh, PartitionSpec())
rows = NamedSharding(mesh, PartitionSpec("rows"))
model = load(sys.argv[1], sharding=lambda name, array: rows if name.endswith("/codes") else whole)
tokens = np.arange(6, dtype=np.int32)[None]
leaf = quantized_leaves(model)["layers.0.mlp.gate_proj"]
assert leaf.codes.sharding == rows and leaf.codes.addressable_shards[0].data.shape[0] == leaf.codes.shape[0] // 2
assert leaf.scales.sharding == whole
np.testing.assert_allclose(model(tokens), np.load(sys.argv[2]), rtol=1e-4, atol=1e-4)
one = load(sys.argv[1], sharding=whole)
assert quantized_leaves(one)["layers.0.mlp.gate_proj"].codes.sharding == whole
print("sharded")
"""


def test_arrays_are_restored_onto_a_mesh(quantized: Llama, saved: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "logits.npy", quantized(TOKENS))
    assert run_python(SHARDED, saved, tmp_path / "logits.npy", devices=2) == "sharded\n"


def test_weights_dequantize_the_same(quantized: Llama, saved: Path) -> None:
    ours, theirs = quantized_leaves(quantized), quantized_leaves(load(saved))
    path = "layers.0.mlp.up_proj"
    assert ours[path].bits == 3
    np.testing.assert_array_equal(weights.dequantize(ours[path]), weights.dequantize(theirs[path]))
