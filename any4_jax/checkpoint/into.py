"""Where the arrays of a checkpoint go on the devices, when they are loaded into a model that says so."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen
from jax.sharding import NamedSharding, PartitionSpec

from any4_jax.nn.linen import boxed
from any4_jax.weights import is_operator

Rule = Callable[[str, jax.ShapeDtypeStruct], NamedSharding | None]


def placement(wanted: Mapping[str, Any], given: Mapping[str, Any], names: Mapping[str, Any]) -> Rule:
    """The shardings of a model's own leaves, as a rule for the arrays that take their place.

    An array, and an operator in the place of one like it, has the NamedShardings of what it replaces. The arrays of
    an operator [*L, N, K] in the place of a float kernel [*L, K, N] are split along the axes that they share with
    it: codes, scales and offsets along N and K, a table for each row along N. An axis whose length the mesh doesn't
    divide is not split. The rest, and operators in the place of other operators, have a copy on each device.

    Args:
      wanted: leaves of the model by dotted path: arrays, ShapeDtypeStructs or operators.
      given: leaves that will be put there, abstract.
      names: the same leaves with names for arrays.
    """
    rules: dict[str, NamedSharding | None] = {}
    for path, leaf in wanted.items():
        if path in given:
            rules |= zip(jax.tree.leaves(names[path]), _shardings(leaf, given[path]), strict=True)
    return lambda name, struct: rules.get(name)


def _shardings(wanted: Any, given: Any) -> list[NamedSharding | None]:
    """One for each array of `given`."""
    arrays, own = jax.tree.leaves(given), [_named(leaf) for leaf in jax.tree.leaves(wanted)]
    structure: Any = jax.tree.structure(wanted)
    if structure == jax.tree.structure(given):
        return [sharding and _split(sharding, sharding.spec, a) for sharding, a in zip(own, arrays, strict=True)]
    sharding = next(filter(None, own), None)
    if sharding is None:
        return [None] * len(arrays)
    if is_operator(wanted) or not is_operator(given):
        return [_split(sharding, (), array) for array in arrays]
    axes: Any = linen.Partitioned(None, (*sharding.spec, *[None] * (wanted.ndim - len(sharding.spec))))
    boxes = jax.tree.leaves(boxed(given, axes), is_leaf=lambda node: isinstance(node, linen.Partitioned))
    return [_split(sharding, box.names, array) for box, array in zip(boxes, arrays, strict=True)]


def _split(sharding: NamedSharding, spec: Any, array: Any) -> NamedSharding:
    """On the mesh of `sharding`, by those entries of `spec` that divide the array."""
    mesh = sharding.mesh
    kept = []
    for size, entry in zip(array.shape, spec, strict=False):
        over = entry if isinstance(entry, tuple) else (entry,) if isinstance(entry, str) else ()
        kept.append(entry if size % math.prod(mesh.shape[name] for name in over) == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*kept), memory_kind=sharding.memory_kind)


def _named(leaf: Any) -> NamedSharding | None:
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None
