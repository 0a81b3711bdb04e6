"""Program.of: the static part of a model and its arrays as they are now, whatever was done to the model before."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from any4_jax.generate import generate
from any4_jax.models import program
from any4_jax.models.program import Program
from any4_jax.models.tiny import random_llama
from any4_jax.pytree import register_dataclass


class Scale(nnx.Module):
    """A layer with an array of its own, beside variables."""

    def __init__(self, size: int) -> None:
        self.array = nnx.data(jnp.ones(size))
        self.empty = nnx.data(None)
        self.size = size


class Net(nnx.Module):
    """Modules in a list and a dict, a shared variable, a static attribute."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List(nnx.Linear(3, 3, rngs=rngs) for _ in range(11))
        self.named = nnx.Dict(a=Scale(2), b=Scale(2))
        self.tied = self.layers[0].kernel
        self.name = "net"


def swap(net: Net) -> None:
    net.layers[0], net.layers[10] = net.layers[10], net.layers[0]


def drop(net: Net) -> None:
    del net.named.a.empty


def rename(net: Net) -> None:
    attributes = vars(net.named.a)
    assert [*attributes][-1] == "size"
    attributes["length"] = attributes.pop("size")


CHANGES: dict[str, Callable[[Net], Any]] = {
    "nothing": lambda net: None,
    "value": lambda net: net.layers[3].kernel.set_value(jnp.zeros((3, 3))),
    "shape": lambda net: net.layers[3].kernel.set_value(jnp.zeros((3, 4))),
    "shared value": lambda net: net.tied.set_value(jnp.zeros((3, 3))),
    "array": lambda net: setattr(net.named.a, "array", jnp.zeros(2)),
    "variable": lambda net: setattr(net.layers[10], "kernel", nnx.Param(jnp.zeros((3, 3)))),
    "one of two that were shared": lambda net: setattr(net, "tied", nnx.Param(jnp.zeros((3, 3)))),
    "kind of variable": lambda net: setattr(net.layers[2], "kernel", nnx.BatchStat(jnp.zeros((3, 3)))),
    "metadata": lambda net: net.layers[2].kernel.set_metadata(mine=3),
    "no value": lambda net: net.layers[2].kernel.set_value(None),
    "module": lambda net: setattr(net.layers, "1", nnx.Linear(3, 3, rngs=nnx.Rngs(1))),
    "module of another kind": lambda net: setattr(net.layers, "1", Scale(3)),
    "two modules": swap,
    "more modules": lambda net: net.layers.append(Scale(3)),
    "class": lambda net: object.__setattr__(net.named.b, "__class__", type("Other", (Scale,), {})),
    "static attribute": lambda net: setattr(net.named.b, "size", 3),
    "static attribute of the model": lambda net: setattr(net, "name", "other"),
    "None": lambda net: setattr(net.layers[1], "bias", None),
    "None before": lambda net: setattr(net.named.a, "empty", nnx.data(nnx.Param(jnp.zeros(2)))),
    "new attribute": lambda net: setattr(net.named.a, "more", 1),
    "one attribute less": drop,
    "another name": rename,
    "tuple of arrays": lambda net: setattr(net, "tables", nnx.data((jnp.zeros(2),))),
    "dict of arrays": lambda net: setattr(net, "tables", nnx.data({"a": jnp.zeros(2)})),
}


@pytest.mark.parametrize("change", CHANGES)
def test_equals_flatten_after_any_change(change: str) -> None:
    net = Net()
    for do in (CHANGES["nothing"], CHANGES[change], CHANGES["nothing"], CHANGES["value"]):
        do(net)
        found, leaves = Program.of(net)
        wanted, treedef = jax.tree.flatten(net)
        assert found.treedef == treedef
        assert len(leaves) == len(wanted) and all(map(lambda a, b: a is b, leaves, wanted))


@register_dataclass
@dataclasses.dataclass
class Box:
    """A container that can be filled later."""

    array: jax.Array | None = None


@pytest.mark.parametrize(
    ("container", "fill"),
    [
        ({}, lambda container, new: container.update(a=new)),
        ({"a": jnp.zeros(2)}, lambda container, new: container.update(a=new)),
        ([], lambda container, new: container.append(new)),
        (([],), lambda container, new: container[0].append(new)),
        (Box(), lambda container, new: setattr(container, "array", new)),
    ],
    ids=["dict", "full-dict", "list", "list-in-tuple", "dataclass"],
)
def test_a_plain_container_is_read_again(container: Any, fill: Callable[[Any, jax.Array], Any]) -> None:
    net, new = Net(), jnp.ones(2)
    net.tables = nnx.data(copy.deepcopy(container))
    Program.of(net)
    fill(net.tables, new)
    assert any(leaf is new for leaf in Program.of(net)[1])


def test_a_model_is_not_flattened_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    models = Net(), random_llama()
    first = [Program.of(model)[0] for model in models]
    models[0].layers[3].kernel.set_value(jnp.zeros((3, 3)))
    monkeypatch.setattr(program.jax.tree, "flatten", None)
    assert [Program.of(model)[0] for model in models] == first
    assert float(jnp.abs(first[0].model(Program.of(models[0])[1]).layers[3].kernel[...]).sum()) == 0


def test_what_is_replaced_is_freed() -> None:
    gc.collect()
    net, before = Net(), len(program._LAYOUTS)
    Program.of(net)
    assert len(program._LAYOUTS) == before + 1
    array, module, model = (weakref.ref(x) for x in (net.layers[3].kernel.get_value(), net.layers[4], net))
    net.layers[3].kernel.set_value(jnp.zeros((3, 3)))
    net.layers[4] = Scale(1)
    gc.collect()
    assert array() is None and module() is None
    del net
    gc.collect()
    assert model() is None and len(program._LAYOUTS) == before


def test_a_model_runs_with_its_newest_arrays() -> None:
    model = random_llama()
    tokens = np.asarray([[1, 2, 3]])
    old = np.asarray(model(tokens)), generate(model, [1, 2, 3], max_new_tokens=8)
    head = model.lm_head.kernel
    head.set_value(-head.get_value())
    np.testing.assert_array_equal(np.asarray(model(tokens)), -old[0])
    assert generate(model, [1, 2, 3], max_new_tokens=1) == [int(np.argmin(old[0][0, -1]))]
    model.lm_head = nnx.Linear(48, 128, use_bias=False, rngs=nnx.Rngs(3))
    assert not np.allclose(np.asarray(model(tokens)), -old[0])
