"""The manifest `any4.json`: what a checkpoint holds, and a digest of every byte of it.

The file is one JSON object with exactly these keys:

    schema   int, at most SCHEMA; increased when an older reader could misread a newer file
    library  {distribution: version} of the libraries that wrote it
    data     name of the directory beside any4.json that holds the rest: "data-" and 12 hex digits
    arrays   {name: {"shape": [int], "dtype": str, "sha256": [hex digest of each 64 MiB of C-order bytes]}}
    files    {path under the data directory: {"size": bytes, "sha256": hex digest}}, Orbax's own included
    content  the caller's own description of its arrays
    sha256   hex digest of the canonical JSON (sorted keys, no spaces, ASCII) of the other keys

Schema 2 differs from schema 1 only in the content of models (`any4_jax.checkpoint.contents`, `schema1`).

The text on disk must equal, byte for byte, the encoding of the values that it parses to: a digest of the parsed
values alone would not notice a changed space or a duplicate key.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn

import pydantic
from pydantic import Field

from any4_jax.schema import check

SCHEMA = 2
DATA_NAME = re.compile(r"data-[0-9a-f]{12}")
DEPTH = 150
"""How deep the objects and lists of a manifest may nest; some parsers of JSON stop at 200."""

_KEYS = {"schema", "library", "data", "arrays", "files", "content", "sha256"}
_SHOWN = 60

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0, lt=2**63)]
DType = Literal[
    "bool",
    "int8",
    "int16",
    "int32",
    "uint8",
    "uint16",
    "uint32",
    "float16",
    "float32",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e8m0fnu",
    "int4",
    "uint4",
]
"""The dtypes of arrays that a checkpoint holds, as numpy or ml_dtypes name them."""

_EXACT = pydantic.ConfigDict(extra="forbid")


@dataclass(frozen=True)
class ArrayEntry:
    """An array: its shape; its dtype; sha256, one hex digest per block of the C-order bytes."""

    __pydantic_config__ = _EXACT

    shape: Annotated[tuple[Size, ...], Field(max_length=64)]
    dtype: DType
    sha256: tuple[Digest, ...]


@dataclass(frozen=True)
class FileEntry:
    """A file: size in bytes; sha256, the hex digest of the whole file."""

    __pydantic_config__ = _EXACT

    size: Size
    sha256: Digest


@dataclass(frozen=True)
class Manifest:
    """`any4.json`, parsed and checked; the module's docstring describes each field."""

    library: Mapping[str, str]
    data: str
    arrays: Mapping[str, ArrayEntry]
    files: Mapping[str, FileEntry]
    content: dict[str, Any]


def check_name(name: object, what: str) -> None:
    """Raise ValueError unless `name` is a relative path: parts between "/", none empty, "." or "..".

    what: the words before the name in the message.
    """
    good = isinstance(name, str) and "\\" not in name and "\0" not in name and ":" not in name
    if not good or any(part in ("", ".", "..") for part in str(name).split("/")):
        raise ValueError(
            f"{what} {shown(name)} is not a relative path of plain parts; "
            'use parts between "/", none of them empty, "." or "..", without backslash, colon or NUL'
        )


def shown(value: object) -> str:
    """A value as text for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def check_depth(value: object, what: str) -> None:
    """Raise ValueError if JSON values are nested more than DEPTH deep; `what` begins the message."""
    level = [value]
    for _ in range(DEPTH + 1):
        level = [inner for outer in level if isinstance(outer, dict | list | tuple) for inner in _within(outer)]
        if not level:
            return
    raise ValueError(f"{what} nested more than {DEPTH} deep; nest less")


def _within(outer: Any) -> Any:
    return outer.values() if isinstance(outer, dict) else outer


def encode(manifest: Manifest) -> bytes:
    """The bytes of `any4.json`.

    Raises:
      TypeError, ValueError: `content` is not plain JSON, or nested too deeply; NaN is not JSON either.
    """
    check_depth(manifest.content, "it is")
    body = {
        "schema": SCHEMA,
        "library": dict(manifest.library),
        "data": manifest.data,
        "arrays": {
            name: {"shape": list(entry.shape), "dtype": entry.dtype, "sha256": list(entry.sha256)}
            for name, entry in manifest.arrays.items()
        },
        "files": {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in manifest.files.items()},
        "content": manifest.content,
    }
    return _text(body | {"sha256": _digest(body)})


def decode(raw: bytes) -> Manifest:
    """The manifest in `raw`.

    Raises:
      ValueError: it isn't a valid manifest; the message is a phrase that continues "any4.json ...".
    """
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({error})") from None
    if not isinstance(value, dict) or type(value.get("schema")) is not int:
        raise ValueError('is not an any4_jax manifest (it has no integer "schema")')
    if value["schema"] > SCHEMA:
        raise ValueError(
            f"was written by a newer any4_jax (schema {shown(value['schema'])}); "
            f"this one reads schemas up to {SCHEMA}, so upgrade any4_jax"
        )
    if value["schema"] < 1 or set(value) != _KEYS:
        raise ValueError(
            f"is damaged: it has schema {shown(value['schema'])} and the keys {shown(sorted(value))}; "
            f"schemas 1 to {SCHEMA} have the keys {', '.join(sorted(_KEYS))}"
        )
    check_depth(value, "is damaged: it is")
    body = {key: item for key, item in value.items() if key != "sha256"}
    try:
        intact = value["sha256"] == _digest(body) and _text(value) == raw
    except ValueError as error:
        # JSON has no infinity, but reads 1e999 as one.
        raise ValueError(f"is damaged: a number in it is too large ({error})") from None
    if not intact:
        raise ValueError("is damaged or was edited: its text doesn't match its own sha256")
    return _build(body)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _build(body: dict[str, Any]) -> Manifest:
    """The typed manifest of a body whose digest matches. A digest can be forged, so every field is checked too."""
    fields = {name: value for name, value in body.items() if name != "schema"}
    manifest = check(Manifest, fields, "is damaged", "restore it from a copy")
    if not DATA_NAME.fullmatch(manifest.data):
        raise ValueError(f'names the data directory {shown(manifest.data)}, and "data-" with 12 hex digits is needed')
    for name in manifest.arrays:
        check_name(name, "names an array: the name")
    for name in manifest.files:
        check_name(name, "names a file that could leave the checkpoint: the path")
    # Not the parser's copy, whose floats need not be the same to the last bit.
    return dataclasses.replace(manifest, content=body["content"])


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def _text(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"
