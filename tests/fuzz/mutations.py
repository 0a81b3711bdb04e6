"""Seeded changes of JSON values, texts and bytes. Nothing here knows what the content means."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

DEEP = 100_000
_NESTS = {"list": ("[", "]"), "object": ('{"a":', "}")}
_MARK = "@deep {}@"
NAN, INFINITY = float("nan"), float("inf")
SCALARS: tuple[Any, ...] = (None, True, False, -1, 0, 1, 2, 3, 7, 0.5, -0.5, 1e-30, 1e308, NAN, INFINITY, -INFINITY)
SIZES: tuple[Any, ...] = (2**31 - 1, 2**31, 2**40, 2**63, 2**64, 10**30, 10**400, -(2**63), 100_000)
TEXTS: tuple[Any, ...] = ("", "x", "1", "nan", " ", "..", "/dev/null", "a\nb", "\0", "\ud800", "\U0001f600", "y" * 5000)
OTHERS: tuple[Any, ...] = ([], {}, [[]], {"": 0}, [None], [1, 2, 3], {"a": {"b": []}}, list(range(2000)))
VALUES = (*SCALARS, *SIZES, *TEXTS, *OTHERS, *(_MARK.format(kind) for kind in _NESTS))
NAMES = ("a\nb", "\ud800", "x", "", "0", "..", "a.b", "A" * 300)


class Changed(NamedTuple):
    """A changed content.

    Attributes:
        content: the value or the bytes.
        words: what was changed, for the report.
        keys: the path of the change in a JSON value.
    """

    content: Any
    words: str
    keys: tuple[str, ...] = ()


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """The path of every value within a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in pairs for place in [(*at, key), *places(inner, (*at, key))]]


def within(value: Any, place: tuple) -> Any:
    for key in place:
        value = value[key]
    return value


def change_value(value: Any, draw: Random) -> Changed:
    """A copy of a JSON value with one change in it."""
    value = copy.deepcopy(value)
    everywhere = places(value)
    if not everywhere:
        return Changed(draw.choice(VALUES), "replaced whole")
    # Long lists and tables are mostly alike, so the kinds of places are drawn before the places.
    kinds: dict[tuple, list[tuple]] = {}
    for place in everywhere:
        named = tuple("#" if isinstance(key, int) else key for key in place)
        kinds.setdefault(named if len(kinds) < 300 else named[:1], []).append(place)
    place = draw.choice(kinds[draw.choice(sorted(kinds, key=repr))])
    parent, key = within(value, place[:-1]), place[-1]
    words = draw.choice(("replace",) * 5 + ("delete", "rename", "swap", "copy"))
    other = draw.choice(everywhere)
    if words == "delete":
        del parent[key]
    elif words == "rename" and isinstance(parent, dict):
        parent[draw.choice((*NAMES, str(other[-1])))] = parent.pop(key)
    elif words == "swap" and place[: len(other)] != other and other[: len(place)] != place:
        upper = within(value, other[:-1])
        parent[key], upper[other[-1]] = upper[other[-1]], parent[key]
        words = f"swap with {shown(other)}"
    elif words == "copy" and isinstance(parent, list):
        parent.insert(draw.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
    else:
        near = near_values(parent[key], draw)
        parent[key] = draw.choice(near) if near and draw.random() < 0.3 else draw.choice(VALUES)
        words = f"become {repr(parent[key])[:40]}"
    return Changed(value, f"{shown(place)}: {words}", tuple(map(str, place)))


def near_values(value: Any, draw: Random) -> list[Any]:
    """Values of the same type that a check of types alone lets pass."""
    if type(value) is int:
        return [value + 1, value - 1, value * 2, value // 2, -value, float(value), str(value)]
    if type(value) is float:
        return [value * 1e6, value / 1e6, -value, value * 1e300, str(value)]
    if isinstance(value, str):
        return [value[::-1], value + value, value[: len(value) // 2], [value], {"content": value}]
    if isinstance(value, list):
        return [value + value, value[::-1], value[:1], {str(index): item for index, item in enumerate(value)}]
    return []


def shown(place: tuple) -> str:
    return ".".join(str(key)[:40] for key in place)


def to_json(value: Any, dump: Callable[[Any], bytes] = lambda value: json.dumps(value).encode()) -> bytes:
    """JSON as `dump` writes it; marks become nests that are too deep for any parser."""
    text = dump(value).decode()
    for kind, (begin, end) in _NESTS.items():
        text = text.replace(json.dumps(_MARK.format(kind)), begin * DEEP + "1" * (kind == "object") + end * DEEP)
    return text.encode()


def change_bytes(content: bytes, draw: Random, first: int | None = None) -> Changed:
    """The bytes with one change; half of the changes are within the `first` ones."""
    end = first if first and draw.random() < 0.5 else len(content)
    at = draw.randrange(max(1, min(end, len(content))))
    kind = draw.choice(("flip", "flip", "put", "number", "number", "cut", "insert", "remove", "double", "nothing"))
    head, tail = content[:at], content[at:]
    if kind == "flip" and tail:
        content = head + bytes([tail[0] ^ 1 << draw.randrange(8)]) + tail[1:]
    elif kind == "put":
        content = head + bytes([draw.choice(b'\0\1\377"{}[]:,-0e')]) + tail[1:]
    elif kind == "number":
        width = draw.choice((2, 4, 8))
        number = draw.choice((0, 1, -1, 2**31, 2**63, 2**62, 2**40, 2**16))
        content = head + (number % 2 ** (8 * width)).to_bytes(width, "little") + tail[width:]
    elif kind == "cut":
        content = head
    elif kind == "insert":
        content = head + draw.randbytes(draw.randrange(1, 9)) + tail
    elif kind == "remove":
        content = head + tail[draw.randrange(1, 9) :]
    elif kind == "double":
        content = head + tail[: draw.randrange(1, 65)] + tail
    else:
        kind, content = "empty", b""
    return Changed(content, f"{kind} at byte {at}")


def change_json(content: bytes, draw: Random) -> Changed:
    """JSON bytes with a changed value, most often, or with changed bytes."""
    if draw.random() < 0.15:
        return change_bytes(content, draw)
    changed = change_value(json.loads(content), draw)
    return changed._replace(content=to_json(changed.content))
