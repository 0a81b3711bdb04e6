"""Trees that contain themselves or have no end are refused before anything is written, and a later save works."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_same

import any4_jax as a4
from any4_jax.methods import Int, quantize
from any4_jax.weights import Sum


def deep(depth: int, wrap) -> dict:
    node = jnp.ones(3)
    for _ in range(depth):
        node = wrap(node)
    return {"a": node}


def cyclic(kind) -> dict:
    tree = {"a": jnp.ones(3)}
    if kind is dict:
        tree["b"] = {"up": tree}
    else:
        tree["b"] = []
        tree["b"].append(tree["b"])
    return tree


CASES = {
    "cycle of dicts": (cyclic(dict), "a dict that contains itself"),
    "cycle of lists": (cyclic(list), "a list that contains itself"),
    "2,000 dicts": (deep(2000, lambda node: {"a": node}), "nested more than 64 deep"),
    "2,000 lists": (deep(2000, lambda node: [node]), "nested more than 64 deep"),
    "200 sums": (deep(200, lambda node: Sum((node,))), "nested more than 64 deep"),
}


@pytest.mark.parametrize(("tree", "said"), CASES.values(), ids=CASES)
def test_what_has_no_end_is_refused(tree, said, tmp_path) -> None:
    for act in (lambda: a4.save(tmp_path / "c", tree), lambda: a4.to_arrays(tree)):
        with pytest.raises(ValueError, match=said) as caught:
            act()
        assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()
    a4.save(tmp_path / "c", deep(60, lambda node: {"a": node}))
    np.testing.assert_array_equal(jax.tree.leaves(a4.load(tmp_path / "c")), [jnp.ones(3)])


def test_tables_of_integers_come_back_and_other_integers_are_no_tables(tmp_path) -> None:
    leaf = quantize(jnp.asarray(np.random.default_rng(0).normal(size=(8, 32)), jnp.float32), Int(group_size=16))
    leaf = dataclasses.replace(leaf, lut=leaf.lut.astype(jnp.int8))
    a4.save(tmp_path / "c", {"a": leaf})
    assert_same(a4.load(tmp_path / "c"), {"a": leaf})
    with pytest.raises(ValueError, match=r"lut is uint8 \[1, 16\], and floats or int8 .* are needed"):
        a4.save(tmp_path / "d", {"a": dataclasses.replace(leaf, lut=leaf.lut.astype(jnp.uint8))})


def test_an_operator_that_would_not_load_is_not_saved(tmp_path) -> None:
    leaf = quantize(jnp.asarray(np.random.default_rng(0).normal(size=(8, 32)), jnp.float32), Int(group_size=16))
    wrong = type(leaf)(leaf.codes, leaf.lut[:, :7], leaf.scales, leaf.offsets, 4, 16, 0, True)
    with pytest.raises(ValueError, match=r"a: the arrays of its QuantizedTensor don't belong together: lut is"):
        a4.save(tmp_path / "c", {"a": wrong})
    assert not (tmp_path / "c").exists()
