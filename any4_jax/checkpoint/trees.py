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


def build_tree(spec: Mapping[str, Any], take: Callable[[str], Any], name: str = "") -> Any:
    """The inverse of `describe_tree`.

    Args:
      spec: what `describe_tree` returned.
      take: maps a name to its array.
      name: where the tree is, for messages.

    Raises:
      ValueError: an operator isn't registered, or lacks a field or has one that its class doesn't have.
    """
    if "dict" in spec:
        return {key: build_tree(value, take, f"{name}.{key}" if name else key) for key, value in spec["dict"].items()}
    if "list" in spec:
        return [build_tree(value, take, f"{name}.{i}" if name else str(i)) for i, value in enumerate(spec["list"])]
    return operator_from_spec(spec["leaf"], take, name)
