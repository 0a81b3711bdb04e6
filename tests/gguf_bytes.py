"""GGUF files byte by byte, so that they can say what no writer writes."""

import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIifBQqd", strict=True))
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9


class Tensor(NamedTuple):
    """One tensor: dims in the file's order, the fastest first; a stored F32 of 4 values unless said otherwise."""

    name: bytes = b"a"
    dims: tuple[int, ...] = (4,)
    kind: int = 0
    offset: int = 0
    axes: int | None = None


def string(content: bytes | str) -> bytes:
    content = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(content)) + content


def value(kind: int, content: Any) -> bytes:
    """A value without its type; that of an array is (type of the elements, elements) or bytes as they are."""
    if isinstance(content, bytes) and kind != STRING:
        return content
    if kind == STRING:
        return string(content)
    if kind == ARRAY:
        element, items = content
        return struct.pack("<IQ", element, len(items)) + b"".join(value(element, item) for item in items)
    return struct.pack(f"<{SCALARS[kind]}", content)


def pair(key: bytes | str, kind: int, content: Any) -> bytes:
    return string(key) + struct.pack("<I", kind) + value(kind, content)


LLAMA = pair("general.architecture", STRING, "llama")


def container(
    pairs: Iterable[bytes] = (LLAMA,),
    tensors: Iterable[Tensor] = (Tensor(),),
    data: bytes = b"\0" * 32,
    *,
    version: int = 3,
    counts: tuple[int | None, int | None] = (None, None),
    alignment: int = 32,
) -> bytes:
    """A whole file; `counts` are the claimed numbers of tensors and pairs."""
    pairs, tensors = list(pairs), list(tensors)
    claimed = [len(have) if count is None else count for have, count in zip((tensors, pairs), counts, strict=True)]
    header = b"GGUF" + struct.pack("<IQQ", version, *claimed) + b"".join(pairs)
    for tensor in tensors:
        axes = len(tensor.dims) if tensor.axes is None else tensor.axes
        header += string(tensor.name) + struct.pack(f"<I{len(tensor.dims)}Q", axes, *tensor.dims)
        header += struct.pack("<IQ", tensor.kind, tensor.offset)
    return header + b"\0" * (-len(header) % alignment) + data
