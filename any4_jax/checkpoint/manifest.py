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

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCHEMA = 2
DATA_NAME = re.compile(r"data-[0-9a-f]{12}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_KEYS = {"schema", "library", "data", "arrays", "files", "content", "sha256"}


@dataclass(frozen=True)
class ArrayEntry:
    """An array: shape; dtype as numpy or ml_dtypes name it; sha256, one hex digest per block of the C-order bytes."""

    shape: tuple[int, ...]
    dtype: str
    sha256: tuple[str, ...]


@dataclass(frozen=True)
class FileEntry:
    """A file: size in bytes; sha256, the hex digest of the whole file."""

    size: int
    sha256: str


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
            f"{what} {name!r} is not a relative path of plain parts; "
            'use parts between "/", none of them empty, "." or "..", without backslash, colon or NUL'
        )


def encode(manifest: Manifest) -> bytes:
    """The bytes of `any4.json`.

    Raises:
      TypeError, ValueError: `content` is not plain JSON; NaN is not either.
    """
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
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({error})") from None
    if not isinstance(value, dict) or type(value.get("schema")) is not int:
        raise ValueError('is not an any4_jax manifest (it has no integer "schema")')
    if value["schema"] > SCHEMA:
        raise ValueError(
            f"was written by a newer any4_jax (schema {value['schema']}); "
            f"this one reads schemas up to {SCHEMA}, so upgrade any4_jax"
        )
    if value["schema"] < 1 or set(value) != _KEYS:
        raise ValueError(
            f"is damaged: it has schema {value['schema']} and the keys {sorted(value)}; "
            f"schemas 1 to {SCHEMA} have the keys {sorted(_KEYS)}"
        )
    body = {key: item for key, item in value.items() if key != "sha256"}
    if value["sha256"] != _digest(body) or _text(value) != raw:
        raise ValueError("is damaged or was edited: its text doesn't match its own sha256")
    return _build(body)


def _build(body: dict[str, Any]) -> Manifest:
    """The typed manifest of a body whose digest matches. A digest can be forged, so every field is checked too."""
    data, library, content = body["data"], body["library"], body["content"]
    if not isinstance(data, str) or not DATA_NAME.fullmatch(data):
        raise ValueError(f'names the data directory {data!r}, and "data-" with 12 hex digits is needed')
    if not isinstance(library, dict) or not all(isinstance(version, str) for version in library.values()):
        raise ValueError('has a "library" that is not an object of version strings')
    if not isinstance(content, dict):
        raise ValueError('has a "content" that is not an object')
    if not isinstance(body["arrays"], dict) or not isinstance(body["files"], dict):
        raise ValueError('has "arrays" or "files" that are not objects')
    for name in body["arrays"]:
        check_name(name, "names an array: the name")
    for name in body["files"]:
        check_name(name, "names a file that could leave the checkpoint: the path")
    arrays = {name: _array_entry(name, entry) for name, entry in body["arrays"].items()}
    files = {name: _file_entry(name, entry) for name, entry in body["files"].items()}
    return Manifest(library=library, data=data, arrays=arrays, files=files, content=content)


def _array_entry(name: str, entry: object) -> ArrayEntry:
    if not (
        isinstance(entry, dict)
        and set(entry) == {"shape", "dtype", "sha256"}
        and isinstance(entry["shape"], list)
        and all(type(size) is int and size >= 0 for size in entry["shape"])
        and isinstance(entry["dtype"], str)
        and isinstance(entry["sha256"], list)
        and all(_is_digest(digest) for digest in entry["sha256"])
    ):
        raise ValueError(f"has no valid shape, dtype and sha256 for array {name!r}")
    return ArrayEntry(tuple(entry["shape"]), entry["dtype"], tuple(entry["sha256"]))


def _file_entry(name: str, entry: object) -> FileEntry:
    if not (
        isinstance(entry, dict)
        and set(entry) == {"size", "sha256"}
        and type(entry["size"]) is int
        and entry["size"] >= 0
        and _is_digest(entry["sha256"])
    ):
        raise ValueError(f"has no valid size and sha256 for file {name!r}")
    return FileEntry(entry["size"], entry["sha256"])


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def _text(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"
