"""Converts trees of arrays and operators to JSON and named arrays, and back."""

from collections.abc import Callable, Mapping
from typing import Any

from any4_jax.checkpoint.operators import operator_from_spec, operator_spec
from any4_jax.weights import is_operator


def describe_tree(node: Any, name: str, arrays: dict[str, Any]) -> Any:
    """JSON that describes a tree.

    Adds the tree's arrays to `arrays` by dotted path, and those of its operators as "<dotted path>/<field>".

    Raises:
      ValueError: a key isn't a string, or holds "." or "/".
    """
    if isinstance(node, Mapping):
        for key in node:
            if not isinstance(key, str) or "." in key or "/" in key:
                where = name or "the tree"
                raise ValueError(f"got the key {key!r} in {where!r}, need a string without '.' and '/'; rename it")
        return {
            "dict": {key: describe_tree(value, f"{name}.{key}" if name else key, arrays) for key, value in node.items()}
        }
    if isinstance(node, list | tuple):
        return {
            "list": [describe_tree(value, f"{name}.{i}" if name else str(i), arrays) for i, value in enumerate(node)]
        }
    if is_operator(node):
        return {"leaf": operator_spec(node, name, arrays)}
    arrays[name] = node
    return {"leaf": {"array": name}}


def build_tree(spec: Mapping[str, Any], take: Callable[[str], Any]) -> Any:
    """The inverse of `describe_tree`; `take` maps a name to its array."""
    if "dict" in spec:
        return {key: build_tree(value, take) for key, value in spec["dict"].items()}
    if "list" in spec:
        return [build_tree(value, take) for value in spec["list"]]
    return operator_from_spec(spec["leaf"], take)
