"""Registers dataclasses as pytrees whose structures differ if their classes do."""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax

C = TypeVar("C", bound=type)


def register_dataclass(cls: C, data_fields: Sequence[str] | None = None, meta_fields: Sequence[str] | None = None) -> C:
    """Registers a dataclass as `jax.tree_util.register_dataclass` does, and tells it from all other classes.

    JAX's own function makes structures equal (`==`) whose fields agree and whose classes don't; only their hashes
    differ (jax 0.10.2 and 0.12.0). Where part of the hashes collides too, in about one process of twenty, `jax.jit`
    runs the program of one class on the arrays of the other. Caches and operators have the same few fields, and what a
    class does with them is all that sets it apart: register them here.

    Args:
        cls: a dataclass; its `__init__` must take all fields by name.
        data_fields: the names of the fields that hold arrays or trees; None takes those that meta_fields lacks.
        meta_fields: the names of the static ones, which must be hashable; None takes those whose metadata say
            `static=True`.

    Returns:
        The class, so that this serves as a decorator.
    """
    fields = dataclasses.fields(cls)
    if meta_fields is None:
        meta_fields = [field.name for field in fields if field.metadata.get("static", False)]
    if data_fields is None:
        data_fields = [field.name for field in fields if field.name not in meta_fields]
    data, meta = _reader(data_fields), _reader(meta_fields)
    keys = [jax.tree_util.GetAttrKey(name) for name in data_fields]
    names = (*data_fields, *meta_fields)

    def flatten_with_keys(node: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        return list(zip(keys, data(node), strict=True)), meta(node)

    def unflatten(static: tuple[Any, ...], children: Iterable[Any]) -> Any:
        return cls(**dict(zip(names, (*children, *static), strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, lambda node: (data(node), meta(node)))
    return cls


def _reader(names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    """Reads the attributes of these names; `attrgetter` is several times faster than a loop, and gives a tuple from two
    names on."""
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda node: tuple(getattr(node, name) for name in names)
