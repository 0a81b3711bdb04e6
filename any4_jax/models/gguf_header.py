"""The header of a GGUF file: what it says of itself, each number compared with the file's length before it is used.

The layout is that of the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian: magic, version,
counts, key-value pairs, tensor infos, then the bytes of each tensor at multiples of the alignment.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from any4_jax.models.gguf_metadata import Metadata
from any4_jax.one_line import shown
from any4_jax.regular_file import check_regular

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIifBQqd", strict=True))
_BOOL, _STRING, _ARRAY = 7, 8, 9
# Bytes of the shortest pair (key, type, value), tensor (name, dimensions, type, offset), string and array.
_LEAST_PAIR, _LEAST_TENSOR = 13, 32
_LEAST = {kind: struct.calcsize(f"<{letter}") for kind, letter in _SCALARS.items()} | {_STRING: 8, _ARRAY: 12}
_DEEPEST = 4
_MOST_AXES = 4
_ALIGNMENT_KEY, _ALIGNMENT = "general.alignment", 32


class Entry(NamedTuple):
    """What the header says of one tensor.

    Attributes:
        shape: row-major, one to four axes, each of at least 1; linears are [N, K].
        kind: the number of its type.
        offset: of its first byte from the start of the data.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


class Header(NamedTuple):
    """What one file says of itself.

    Attributes:
        path: the file.
        length: its size in bytes.
        start: where the data starts, in bytes.
        alignment: a power of two of at least 8, in bytes.
        metadata: its values.
        tensors: name -> entry; the entries aren't compared with the data.
    """

    path: Path
    length: int
    start: int
    alignment: int
    metadata: Metadata
    tensors: dict[str, Entry]


def read_header(path: Path) -> Header:
    """Reads the header of one file. Nothing that it claims makes this read or reserve more than the file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a GGUF file, or the header is damaged or truncated; the message says where.
    """
    length = check_regular(path)
    with open(path, "rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{path} doesn't begin as a GGUF file does; give a .gguf file")
        cursor = _Cursor(path, file, length - len(_MAGIC))
        (version,) = cursor.numbers("I")
        if version not in _VERSIONS:
            raise ValueError(f"{path} is of GGUF version {version}, and 2 or 3 (little-endian) is needed; convert it")
        tensor_count, pair_count = cursor.numbers("QQ")
        cursor.refuse_more("tensors", tensor_count, _LEAST_TENSOR)
        cursor.refuse_more("pairs", pair_count, _LEAST_PAIR)
        metadata = _metadata(cursor, pair_count)
        tensors = _tensors(cursor, tensor_count)
    alignment = _alignment(metadata)
    start = -(-(length - cursor.left) // alignment) * alignment
    return Header(path, length, start, alignment, metadata, tensors)


class _Cursor:
    """Reads a file from front to back, and never asks for more than is left of it.

    Attributes:
        path: the file.
        left: the bytes that are left.
        place: what is being read, for messages.
    """

    def __init__(self, path: Path, file: BinaryIO, left: int) -> None:
        self.path, self._file, self.left = path, file, left
        self.place = "its counts"

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise self.damage(f"needs {size} bytes, and {self.left} are left")
        content = self._file.read(size)
        if len(content) != size:
            raise self.damage("the file became shorter while it was read")
        self.left -= size
        return content

    def numbers(self, letters: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{letters}", self.take(struct.calcsize(f"<{letters}")))

    def string(self) -> bytes:
        return self.take(int.from_bytes(self.take(8), "little"))

    def name(self, of: str) -> str:
        content = self.string()
        try:
            return str(content, "utf-8")
        except UnicodeDecodeError:
            raise self.damage(f"{of} is {shown(content)}, and UTF-8 is needed") from None

    def refuse_more(self, what: str, count: int, least: int) -> None:
        """Refuses more things than the rest of the file can hold, when each has this many bytes at least."""
        if count * least > self.left:
            raise self.damage(f"claims {count} {what}, and {self.left // least} fit into the rest of the file")

    def damage(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is damaged or truncated in its header ({self.place}: {what}); fetch it again")


def _metadata(cursor: _Cursor, count: int) -> Metadata:
    values: dict[str, Any] = {}
    undecodable: dict[str, bytes] = {}
    for number in range(count):
        cursor.place = f"pair {number + 1} of {count}"
        key = cursor.name("its key")
        if key in values:
            raise ValueError(f"{cursor.path} holds the key {shown(key)} twice; convert the model again")
        cursor.place = shown(key)
        (kind,) = cursor.numbers("I")
        wrong: list[bytes] = []
        values[key] = _value(cursor, kind, wrong, depth=0)
        if wrong:
            undecodable[key] = wrong[0]
    return Metadata(cursor.path, values, undecodable)


def _value(cursor: _Cursor, kind: int, wrong: list[bytes], depth: int) -> Any:
    """One value; texts that are not UTF-8 are added to `wrong`."""
    if kind == _STRING:
        content = cursor.string()
        try:
            return str(content, "utf-8")
        except UnicodeDecodeError:
            wrong.append(content)
            return ""
    if kind == _ARRAY:
        if depth == _DEEPEST:
            raise cursor.damage(f"its arrays are nested deeper than {_DEEPEST}")
        element, count = cursor.numbers("IQ")
        cursor.refuse_more("elements", count, _LEAST.get(element, 1))
        if element in _SCALARS:
            return _scalars(cursor, element, count)
        _refuse_unknown(cursor, element)
        return [_value(cursor, element, wrong, depth + 1) for _ in range(count)]
    _refuse_unknown(cursor, kind)
    (scalar,) = _scalars(cursor, kind, 1)
    # 1e-5 is stored as a float32; the shortest decimal for that float32 is the number that was written.
    return float(str(np.float32(scalar))) if _SCALARS[kind] == "f" else scalar


def _scalars(cursor: _Cursor, kind: int, count: int) -> list[Any]:
    numbers: list[Any] = np.frombuffer(cursor.take(count * _LEAST[kind]), f"<{_SCALARS[kind]}").tolist()
    if kind != _BOOL:
        return numbers
    if max(numbers, default=0) > 1:
        raise cursor.damage(f"a bool is {max(numbers)}, and 0 or 1 is needed")
    return [bool(number) for number in numbers]


def _refuse_unknown(cursor: _Cursor, kind: int) -> None:
    if kind not in _LEAST:
        raise cursor.damage(f"its type is {kind}, and one of 0 to {max(_LEAST)} is needed")


def _tensors(cursor: _Cursor, count: int) -> dict[str, Entry]:
    tensors: dict[str, Entry] = {}
    for number in range(count):
        cursor.place = f"tensor {number + 1} of {count}"
        name = cursor.name("its name")
        if name in tensors:
            raise ValueError(f"{cursor.path} holds tensor {shown(name)} twice; convert the model again")
        cursor.place = f"tensor {shown(name)}"
        (axes,) = cursor.numbers("I")
        if not 1 <= axes <= _MOST_AXES:
            raise cursor.damage(f"has {axes} axes, and 1 to {_MOST_AXES} are needed")
        shape = cursor.numbers("Q" * axes)[::-1]
        if 0 in shape:
            raise cursor.damage(f"has the shape {shape}, and axes of at least 1 are needed")
        tensors[name] = Entry(shape, *cursor.numbers("IQ"))
    return tensors


def _alignment(metadata: Metadata) -> int:
    value = metadata.value(_ALIGNMENT_KEY, int, _ALIGNMENT)
    # The specification asks for a multiple of 8, and its readers for a power of two.
    if value < 8 or value & (value - 1):
        raise ValueError(
            f"{metadata.path}: {_ALIGNMENT_KEY} is {value}, and a power of two of at least 8 is needed; "
            "convert the model again"
        )
    return value
