"""GGUF and safetensors files taken apart, so that one value of the header can change and the rest stays right."""

from __future__ import annotations

import json
import math
import struct
from random import Random
from typing import Any

import gguf
import numpy as np
from gguf_bytes import ARRAY, BOOL, F32, I32, SCALARS, STRING, U32, Tensor, container, pair

from fuzz.mutations import Changed, change_bytes, change_value, to_json

U64 = 10
VALUES: tuple[tuple[int, Any], ...] = (
    *((U32, number) for number in (0, 1, 2, 3, 7, 100_000, 2**31, 2**32 - 1)),
    *((I32, number) for number in (-1, 0, 2, -(2**31))),
    *((U64, number) for number in (2**63, 2**40)),
    *((F32, number) for number in (0.0, -1.0, 0.5, 1e-30, 1e38, float("nan"), float("inf"))),
    *((BOOL, flag) for flag in (True, False, 2)),
    *((STRING, text) for text in (b"", b"x", b"\xff", b"a\nb", b"1", "\u2581".encode() * 2000)),
    *((ARRAY, (kind, items)) for kind, items in ((U32, []), (U32, [1, 2]), (STRING, ["a", "a"]), (F32, [0.5] * 4))),
    (ARRAY, (ARRAY, [(ARRAY, [(U32, [1])])])),
    (13, b""),
)


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self.content, self.at)
        self.at += struct.calcsize(f"<{letter}")
        return value

    def string(self) -> bytes:
        size = self.number("Q")
        self.at += size
        return self.content[self.at - size : self.at]

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            element, count = self.number("I"), self.number("Q")
            return element, [self.value(element) for _ in range(count)]
        return self.number(SCALARS[kind])


def take_apart(content: bytes) -> tuple[list[tuple[bytes, int, Any]], list[Tensor], bytes]:
    """The pairs (key, type, value), the tensors and the data of a GGUF file."""
    reader = _Reader(content)
    reader.at = 8
    tensors, pairs = [], []
    tensor_count, pair_count = reader.number("Q"), reader.number("Q")
    for _ in range(pair_count):
        key, kind = reader.string(), reader.number("I")
        pairs.append((key, kind, reader.value(kind)))
    for _ in range(tensor_count):
        name, axes = reader.string(), reader.number("I")
        dims = tuple(reader.number("Q") for _ in range(axes))
        tensors.append(Tensor(name, dims, reader.number("I"), reader.number("Q")))
    return pairs, tensors, content[-(-reader.at // 32) * 32 :]


def change_gguf(content: bytes, draw: Random) -> Changed:
    """A GGUF file with one changed value, tensor or byte."""
    kind = draw.choice(("pair", "pair", "pair", "item", "tensor", "tensor", "bytes"))
    pairs, tensors, data = take_apart(content)
    header = len(content) - len(data)
    if kind == "bytes":
        return change_bytes(content, draw, header)
    if kind == "tensor":
        words = _change_tensor(tensors, draw)
    elif kind == "item":
        words = _change_item(pairs, draw)
    else:
        words = _change_pair(pairs, draw)
    return Changed(container((pair(*one) for one in pairs), tensors, data), words)


def _change_pair(pairs: list[tuple[bytes, int, Any]], draw: Random) -> str:
    at = draw.randrange(len(pairs))
    key, kind, value = pairs[at]
    other = draw.randrange(len(pairs))
    words = draw.choice(("become",) * 5 + ("near", "near", "delete", "rename", "swap", "twice"))
    if words == "delete":
        del pairs[at]
    elif words == "rename":
        pairs[at] = (draw.choice((b"x", b"", b"\xff", pairs[other][0])), kind, value)
    elif words == "swap":
        pairs[at], pairs[other] = (key, *pairs[other][1:]), (pairs[other][0], kind, value)
        words = f"swap with {pairs[other][0]!r}"
    elif words == "twice":
        pairs.append(pairs[at])
    elif words == "near" and kind in (U32, I32):
        pairs[at] = (key, kind, draw.choice((value + 1, max(value - 1, 0), value * 2, value // 2)) % 2**31)
    else:
        pairs[at] = (key, *draw.choice(VALUES))
        words = f"become {pairs[at][1:]!r}"
    return f"{key.decode()}: {words}"[:120]


def _change_item(pairs: list[tuple[bytes, int, Any]], draw: Random) -> str:
    """Within a list, such as that of the tokens."""
    lists = [at for at, (_, kind, value) in enumerate(pairs) if kind == ARRAY and value[1]]
    if not lists:
        return "nothing"
    at = draw.choice(lists)
    key, _, (element, items) = pairs[at]
    items = list(items)
    place = draw.randrange(len(items))
    words = draw.choice(("delete", "double", "become", "become", "become", "reverse", "cut"))
    if words == "delete":
        del items[place]
    elif words == "double":
        items.insert(place, items[place])
    elif words == "reverse":
        items.reverse()
    elif words == "cut":
        items = items[:place]
    else:
        fits = [value for kind, value in VALUES if kind == element]
        items[place] = draw.choice(fits) if fits else items[place]
        words = f"become {items[place]!r}"
    pairs[at] = (key, ARRAY, (element, items))
    return f"{key.decode()}.{place}: {words}"[:120]


def _change_tensor(tensors: list[Tensor], draw: Random) -> str:
    at, other = draw.randrange(len(tensors)), draw.randrange(len(tensors))
    one = tensors[at]
    words = draw.choice(("dims", "dims", "kind", "offset", "name", "axes", "delete", "swap"))
    if words == "dims":
        size = draw.choice((0, 1, 2, 3, 2**31, 2**40, 2**63, one.dims[0] * 2, one.dims[0] // 2))
        place = draw.randrange(len(one.dims))
        dims = (*one.dims[:place], size, *one.dims[place + 1 :])
        tensors[at] = one._replace(dims=draw.choice((dims, dims, one.dims[::-1], (*one.dims, 1), one.dims[:1])))
    elif words == "kind":
        tensors[at] = one._replace(kind=draw.choice((0, 1, 2, 8, 12, 24, 26, 28, 30, 31, 39, 2**31)))
    elif words == "offset":
        tensors[at] = one._replace(offset=draw.choice((0, 1, 32, 2**40, 2**63, one.offset + 32, tensors[other].offset)))
    elif words == "name":
        tensors[at] = one._replace(name=draw.choice((b"", b"x", b"\xff", tensors[other].name, one.name + b"x")))
    elif words == "axes":
        tensors[at] = one._replace(axes=draw.choice((0, 1, 3, 5, 2**31)))
    elif words == "delete":
        del tensors[at]
    else:
        tensors[at], tensors[other] = one._replace(name=tensors[other].name), tensors[other]._replace(name=one.name)
    return f"tensor {one.name.decode()}: {words}"


def change_safetensors(content: bytes, draw: Random) -> Changed:
    """A safetensors file with one changed value of its header, or one changed byte."""
    length = int.from_bytes(content[:8], "little")
    kind = draw.random()
    if kind < 0.3:
        return change_bytes(content, draw, 8 + length)
    if kind < 0.45:
        return _change_number(content, 8 + length, draw)
    changed = change_value(json.loads(content[8 : 8 + length]), draw)
    header = to_json(changed.content)
    return changed._replace(content=len(header).to_bytes(8, "little") + header + content[8 + length :])


def _change_number(content: bytes, first: int, draw: Random) -> Changed:
    """One stored number becomes NaN, infinite or large."""
    at = first + draw.randrange((len(content) - first) // 4) * 4
    word = draw.choice((b"\0\0\300\177", b"\0\0\200\177", b"\0\0\200\377", b"\377\377\177\177"))
    return Changed(content[:at] + word + content[at + 4 :], f"the number at {at} is {struct.unpack('<f', word)[0]}")


def quantized(content: bytes) -> bytes:
    """A GGUF file of float16 tensors, whose matrices with rows of whole blocks become 4 and 8 bits."""
    pairs, tensors, data = take_apart(content)
    kinds = gguf.GGMLQuantizationType
    made, parts = [], b""
    for at, one in enumerate(tensors):
        kind = kinds(one.kind)
        size = math.prod(one.dims) * {kinds.F16: 2, kinds.F32: 4}[kind]
        raw = data[one.offset : one.offset + size]
        if len(one.dims) == 2 and one.dims[0] % 32 == 0:
            values = np.frombuffer(raw, np.float16).reshape(one.dims[::-1]).astype(np.float32)
            kind = (kinds.Q4_0, kinds.Q8_0)[at % 2]
            raw = gguf.quants.quantize(values, kind).tobytes()
        made.append(one._replace(kind=int(kind), offset=len(parts)))
        parts += raw + b"\0" * (-len(raw) % 32)
    return container((pair(*one) for one in pairs), made, parts)
