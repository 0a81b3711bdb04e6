"""Checkpoints of trees: what does not fit a model is named, where operators are placed, and their arrays' layout."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from float_models import NF, LinenNet, NNXNet, X, assert_same_contents
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from small_weights import entries

import any4_jax as a4
from any4_jax.checkpoint import store
from any4_jax.checkpoint.into import placement
from any4_jax.methods import Int, quantize
from any4_jax.surgery import container_of
from any4_jax.weights import ScaleInput, Sum, nonzeros


def shapes(**changes) -> dict:
    """An abstract tree of two layers, with leaves changed by name; None takes one out."""
    leaves = {"a": (24, 8), "b": (8,), "c": (8, 4)}
    struct = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()} | changes
    layers = {"a": {"kernel": struct["a"], "bias": struct["b"]}, "c": {"kernel": struct["c"]}}
    kept = {layer: {key: leaf for key, leaf in made.items() if leaf is not None} for layer, made in layers.items()}
    return kept | {name: leaf for name, leaf in changes.items() if name not in leaves}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> tuple[dict, Path]:
    """A tree of the shapes above, its first layer quantized, and its checkpoint."""
    rng = np.random.default_rng(2)
    arrays = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes())
    made = arrays | {"a": arrays["a"] | {"kernel": quantize(arrays["a"]["kernel"].T, NF)}}
    path = tmp_path_factory.mktemp("tree") / "c"
    a4.save(path, made)
    return made, path


@pytest.mark.parametrize(
    "into, said",
    [
        (shapes(b=None), "the model has no a.bias"),
        (shapes(d=jax.ShapeDtypeStruct((3,), jnp.float32)), "they lack d"),
        (shapes(a=jax.ShapeDtypeStruct((8, 24), jnp.float32)), r"a.kernel is \[8, 24\], need \[24, 8\]"),
        (shapes(c=jax.ShapeDtypeStruct((4, 4), jnp.float32)), r"c.kernel is \[8, 4\], need \[4, 4\]"),
        (shapes(b=jax.ShapeDtypeStruct((8,), jnp.bfloat16)), "a.bias is float32, need bfloat16"),
        ({}, "the model has no a.bias, a.kernel, c.kernel"),
        ((LinenNet(), shapes(c=None)), "the model has no c.kernel"),
        ({"x": {str(i): jnp.ones(1) for i in range(9)}}, "they lack x.0, x.1, x.2 and 6 more; the model has no a.bias"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_read(into, said: str, tree, monkeypatch) -> None:
    monkeypatch.setattr(store, "read", lambda *a, **k: pytest.fail("arrays were read"))
    with pytest.raises(ValueError, match=said) as error:
        a4.load(tree[1], into=into)
    assert "\n" not in str(error.value) and str(tree[1]) in str(error.value)


def test_an_operator_where_no_dense_layer_is_does_not_fit(tmp_path) -> None:
    embedding = NNXNet(nnx.Rngs(0))
    contents = container_of(embedding).tree(embedding)
    contents["norm"]["scale"] = quantize(jnp.ones((24, 16)), NF)
    a4.save(tmp_path / "c", contents)
    with pytest.raises(ValueError, match=r"norm\.scale is quantized and is not the kernel of a dense layer"):
        a4.load(tmp_path / "c", into=embedding)


def test_matrices_of_few_entries_are_saved_and_loaded(tree, tmp_path) -> None:
    made, _ = tree
    few = entries([0, 3, 3, 7], [23, 5, 5, 0], [0.5, 1, 0, -2], 8, 24, padding=1)
    leaf = made["a"]["kernel"]
    stack = jax.tree.map(lambda *entries: jnp.stack(entries), few, few)
    for operator in (few, Sum((leaf, few)), stack, nonzeros(jnp.zeros((8, 24)))):
        contents = {"a": {"kernel": operator, "bias": made["a"]["bias"]}, "c": made["c"]}
        a4.save(tmp_path / "c", contents)
        loaded = a4.load(tmp_path / "c")
        assert_same_contents(loaded, contents)
        assert loaded["a"]["kernel"].shape == operator.shape
        if operator is not stack:
            assert_same_contents(a4.load(tmp_path / "c", into=shapes()), contents)
    with pytest.raises(ValueError, match=r"a\.kernel is \[8, 24\], need \[9, 24\]"):
        a4.load(tmp_path / "c", into=shapes(a=jax.ShapeDtypeStruct((24, 9), jnp.float32)))


def test_operators_are_split_as_the_kernels_that_they_replace(tree) -> None:
    made, _ = tree
    mesh = AbstractMesh((2, 4), ("x", "y"))

    def at(*shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    def specs(wanted, given):
        names = jax.tree.unflatten(jax.tree.structure(given), [str(i) for i in range(len(jax.tree.leaves(given)))])
        rule = placement({"k": wanted}, {"k": given}, {"k": names})
        found = [rule(name, None) for name in jax.tree.leaves(names)]
        return [sharding and tuple(sharding.spec) for sharding in found]

    leaf = made["a"]["kernel"]  # codes [8, 12], lut [1, 16], scales [8, 2]
    assert specs(at(24, 8, spec=(None, "x")), leaf) == [("x", None), (None, None), ("x", None)]
    assert specs(at(24, 8, spec=("y", "x")), leaf) == [("x", "y"), (None, None), ("x", None)]
    assert specs(at(24, 8, spec=(("x", "y"),)), leaf) == [(None, None), (None, None), (None, None)]
    scaled = ScaleInput(leaf, jnp.ones(24))
    assert specs(at(24, 8, spec=("y", "x")), scaled)[-1] == ("y",)
    split = jax.tree.map(lambda a: at(*a.shape, spec=("x",) if a.shape[0] == 8 else ()), leaf)
    assert specs(split, leaf) == [("x",), (), ("x",)]
    assert specs(split, scaled) == [()] * 4
    assert specs(at(8, spec=("y",)), made["a"]["bias"]) == [("y",)]
    assert specs(jnp.ones(8), made["a"]["bias"]) == [None]


def test_arrays_have_the_documented_layout() -> None:
    w = jnp.asarray(X[:, :20])
    leaf, byte = quantize(w, NF), quantize(w, Int(3, group_size=8))
    double = dataclasses.replace(leaf, scales=quantize(leaf.scales, Int(8, zero_point="float")))
    tree = {"plain": [w], "a": {"kernel": double}, "b": {"kernel": Sum((ScaleInput(byte, w[0]), w))}}
    arrays, spec = a4.to_arrays(tree)
    assert set(arrays["a"]["kernel"]) == {"codes", "lut", "scales"}
    assert set(arrays["a"]["kernel"]["scales"]) == {"codes", "lut", "scales", "offsets"}
    assert set(arrays["b"]["kernel"]["terms"]) == {"0", "1"} and arrays["plain"]["0"] is w
    assert set(arrays["b"]["kernel"]["terms"]["0"]["inner"]["codes"]) == {"0", "1"}
    assert_same_contents(a4.from_arrays(jax.tree.map(np.asarray, arrays), spec), tree)
    missing = arrays["a"]["kernel"].pop("lut")
    with pytest.raises(ValueError, match=r"the arrays lack 'a\.kernel/lut' of the spec"):
        a4.from_arrays(arrays, spec)
    arrays["a"]["kernel"] |= {"lut": missing, "luts": missing}
    with pytest.raises(ValueError, match=r"the spec has no array 'a\.kernel\.luts'"):
        a4.from_arrays(arrays, spec)


def test_orbax_restores_operators_into_an_abstract_tree(tree, tmp_path) -> None:
    made, _ = tree
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", made)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "c", jax.eval_shape(lambda: made))
    assert isinstance(back["a"]["kernel"], a4.QuantizedTensor)
    assert_same_contents(back, made)
