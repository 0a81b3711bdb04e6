"""register_dataclass: as JAX's own, but classes with equal fields have structures that differ."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

import any4_jax
from any4_jax.pytree import register_dataclass


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair:
    first: Any
    second: Any
    name: str = dataclasses.field(default="", metadata=dict(static=True))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class OtherPair(Pair):
    """The same fields."""


def test_classes_with_equal_fields_have_structures_that_differ() -> None:
    one, other = jax.tree.structure(Pair(1, 2)), jax.tree.structure(OtherPair(1, 2))
    # JAX's own registration fails here, whereupon `jit` takes one for the other if their hashes collide.
    assert one != other
    assert one == jax.tree.structure(Pair(3, 4)) != jax.tree.structure(Pair(3, 4, "static"))


def test_nodes_keep_their_class_fields_and_paths() -> None:
    node = OtherPair({"x": 1}, (2, None), "n")
    leaves, structure = jax.tree_util.tree_flatten_with_path(node)
    assert [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves] == [(".first['x']", 1), (".second[0]", 2)]
    assert jax.tree.unflatten(structure, [1, 2]) == node
    assert type(jax.jit(lambda pair: pair)(Pair(1, 2))) is Pair


def test_the_library_registers_no_class_with_jax_itself() -> None:
    sources = Path(any4_jax.__file__).parent.rglob("*.py")
    assert [path.name for path in sources if "@jax.tree_util.register_dataclass" in path.read_text()] == []
