"""Refuses models that contain themselves or are nested without end, before anything walks them by recursion."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from any4_jax.weights import is_operator

NESTING = 64
"""How deep dicts, lists and operators may nest in a model. Each takes up to two levels of JSON."""


def check_nesting(model: Any) -> None:
    """Raises ValueError if a tree, or the variables of a Linen pair, contains itself or is nested too deeply.

    Other models pass: their containers know what they hold.
    """
    stack: list[tuple[str, Any, tuple[int, ...]]] = [("", model, ())]
    while stack:
        name, node, around = stack.pop()
        inner = list(_inner(node))
        if not inner:
            continue
        if id(node) in around:
            raise ValueError(
                f"{_shown(name)} is a {type(node).__name__} that contains itself; save a tree without cycles"
            )
        if len(around) > NESTING:
            raise ValueError(f"{_shown(name)} is nested more than {NESTING} deep; save a flatter tree")
        stack += [(f"{name}.{key}".lstrip("."), value, (*around, id(node))) for key, value in inner]


def _inner(node: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(node, Mapping):
        return node.items()
    if is_operator(node):
        return [(field.name, getattr(node, field.name)) for field in dataclasses.fields(node)]
    return enumerate(node) if isinstance(node, list | tuple) else ()


def _shown(name: str) -> str:
    if not name:
        return "the tree"
    return name if len(name) <= 60 else f"{name[:60]}..."
