"""How the arrays of a checkpoint are sharded when they are loaded into a model that has shardings."""

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
    """A sharding rule for a checkpoint's arrays, made from the shardings of the leaves that they replace.

    An array takes the NamedSharding of the array that it replaces, and so do the arrays of an operator that replaces
    an operator of the same structure. If an operator [*L, N, K] replaces a float kernel [*L, K, N], its arrays are
    split along the axes that they share with the kernel: codes, scales and offsets along N and K, a table for each
    row along N. An axis whose length the mesh doesn't divide is not split. All other arrays, and those of an operator
    that replaces one of another structure, are replicated on every device.

    Args:
      wanted: leaves of the model by dotted path: arrays, ShapeDtypeStructs or operators.
      given: the abstract leaves that will replace them.
      names: the leaves of `given` with names in place of arrays.

    Returns:
      A function of (array name, ShapeDtypeStruct) that returns a NamedSharding, or None for the default device.
    """
    rules: dict[str, NamedSharding | None] = {}
    for path, leaf in wanted.items():
        if path in given:
            rules |= zip(jax.tree.leaves(names[path]), _shardings(leaf, given[path]), strict=True)
    return lambda name, struct: rules.get(name)


def _shardings(wanted: Any, given: Any) -> list[NamedSharding | None]:
    """The sharding of each array of `given`."""
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
    """A sharding on the mesh of `sharding`, with those entries of `spec` that divide the array's axes."""
    mesh = sharding.mesh
    kept = []
    for size, entry in zip(array.shape, spec, strict=False):
        over = entry if isinstance(entry, tuple) else (entry,) if isinstance(entry, str) else ()
        kept.append(entry if size % math.prod(mesh.shape[name] for name in over) == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*kept), memory_kind=sharding.memory_kind)


def _named(leaf: Any) -> NamedSharding | None:
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None
