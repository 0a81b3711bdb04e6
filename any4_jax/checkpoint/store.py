"""Arrays, small files and a manifest in one directory, which is replaced as a whole. Nothing here depends on models.

    DIR/any4.json               the manifest (`any4_jax.checkpoint.manifest`), which names the data directory
    DIR/data-<12 hex>/arrays/   the arrays, as `any4_jax.checkpoint.arrays` stores them
    DIR/data-<12 hex>/files/    the caller's files (tokenizer and the like)

A save writes a new data directory, syncs it to disk, then renames a new any4.json over the old one. The checkpoint
changes at that rename alone: a save that is killed before it leaves the old checkpoint, one that is killed after it
leaves the new one. The next save that succeeds removes what killed saves left behind; a load never removes anything.
While a save runs, another save to the same directory is refused, and a load returns the old or the new checkpoint, or
raises an error that says that the checkpoint was replaced.
"""

import os
import shutil
import uuid
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from any4_jax.checkpoint import directory
from any4_jax.checkpoint.arrays import (
    ShardingRule,
    array_entry,
    check_array,
    load_arrays,
    save_arrays,
    to_host,
)
from any4_jax.checkpoint.directory import MANIFEST_NAME
from any4_jax.checkpoint.manifest import Manifest, check_name, decode, encode

_LIBRARIES = ("any4_jax", "jax", "orbax-checkpoint")


def write(
    path: str | os.PathLike[str],
    arrays: Mapping[str, jax.Array | np.ndarray],
    manifest: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a checkpoint to the directory `path`, or replace the one there as a whole.

    If it raises, the old checkpoint stays as it was.

    Args:
      path: a directory; it may hold an older checkpoint.
      arrays: of any shape, also scalar or empty; names are relative paths ("layers.0.q_proj/codes").
      manifest: plain JSON; tuples come back as lists.
      files: relative path -> bytes.

    Raises:
      TypeError, ValueError: an array, a name or the manifest can't be stored.
      FileExistsError: `path` holds something other than a checkpoint.
      OSError: `path` can't be written, or another save to it is running.
    """
    root = Path(path)
    for name, array in arrays.items():
        check_name(name, "array name")
        check_array(name, array)
    for name in files or {}:
        check_name(name, "file name")
    content = dict(manifest)
    try:
        encode(Manifest(library={}, data="", arrays={}, files={}, content=content))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"the manifest is not plain JSON ({error}); pass dicts, lists, strings and finite numbers"
        ) from None
    with directory.locked(root):
        try:
            _replace(root, arrays, content, files or {})
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(
                f"can't write checkpoint {root} ({reason}); free some space there or pass another directory"
            ) from error


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The checked manifest of the checkpoint at `path`; its arrays and files are not read.

    Raises:
      FileNotFoundError: `path` holds no checkpoint.
      OSError: any4.json can't be read.
      ValueError: any4.json is damaged, of a newer version, or no regular file.
    """
    root = Path(path)
    try:
        raw = directory.inside(root, root / MANIFEST_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{root} holds no {MANIFEST_NAME}, so it is not an any4_jax checkpoint; pass the directory of one"
        ) from None
    except OSError as error:
        raise OSError(
            f"checkpoint {root}: {MANIFEST_NAME} can't be read ({error.strerror}); make it readable"
        ) from None
    try:
        return decode(raw)
    except ValueError as error:
        raise ValueError(f"checkpoint {root}: {MANIFEST_NAME} {error}") from None


def verify(path: str | os.PathLike[str]) -> Manifest:
    """The manifest, after checking the size and sha256 of every file that it lists.

    Raises:
      FileNotFoundError, OSError: see `read_manifest`.
      ValueError: as `read_manifest`, or a file is missing, damaged or no regular file; the message names the first
        such file.
    """
    root = Path(path)
    manifest = read_manifest(root)
    for name, wanted in manifest.files.items():
        try:
            found = directory.file_entry(directory.inside(root, root / manifest.data / name))
        except OSError as error:
            _refuse_if_overtaken(root, manifest)
            fault = f"can't be read ({error.strerror})"
        else:
            if found == wanted:
                continue
            fault = f"has {found.size} bytes and needs {wanted.size}"
            if found.size == wanted.size:
                fault = "is damaged (its sha256 differs)"
        raise ValueError(f"checkpoint {root}: {manifest.data}/{name} {fault}; restore the checkpoint from a copy")
    directory.check_contained(root, root / manifest.data)
    return manifest


def read(
    path: str | os.PathLike[str], *, sharding: ShardingRule = None, paths: Collection[str] | None = None
) -> tuple[dict[str, jax.Array], dict[str, Any], dict[str, bytes]]:
    """The (arrays, manifest, files) that were given to `write`, names in sorted order, every byte checked.

    Besides the result it needs a few MiB of host memory, or that of one array if the result isn't on one CPU device.

    Args:
      path: the directory of a checkpoint.
      sharding: None for the default device, one Sharding for all arrays, or a function of (name, ShapeDtypeStruct)
        that returns either.
      paths: names of the arrays to read; None reads all.

    Raises:
      FileNotFoundError, OSError: see `verify`; OSError also if a save replaced the checkpoint while it was read.
      ValueError: as `verify`, or `paths` has an unknown name, or a sharding doesn't fit an array.
    """
    root = Path(path)
    manifest = verify(root)
    unknown = sorted(set(paths or ()) - set(manifest.arrays))
    if unknown:
        raise ValueError(f"checkpoint {root} has no array {unknown[0]!r}; `read_manifest` lists its arrays")
    entries = {name: entry for name, entry in manifest.arrays.items() if paths is None or name in paths}
    data = root / manifest.data
    try:
        loaded = dict(load_arrays(data / "arrays", entries, sharding))
        files = {
            name.removeprefix("files/"): (data / name).read_bytes()
            for name in manifest.files
            if name.startswith("files/")
        }
    except (ValueError, OSError) as error:
        _refuse_if_overtaken(root, manifest)
        raise ValueError(f"checkpoint {root}: {error}") from None
    return {name: loaded[name] for name in entries}, manifest.content, files


def _refuse_if_overtaken(root: Path, manifest: Manifest) -> None:
    """Raise OSError if a save has replaced `manifest`, and so removed its files, since it was read."""
    if read_manifest(root).data != manifest.data:
        raise OSError(f"checkpoint {root} was replaced by a save while it was read; read it again")


def _replace(
    root: Path,
    arrays: Mapping[str, jax.Array | np.ndarray],
    content: dict[str, Any],
    files: Mapping[str, bytes],
) -> None:
    """Write the new data directory and manifest beside the old ones, swap them in, and remove leftovers."""
    token = uuid.uuid4().hex[:12]
    data, temporary = root / f"data-{token}", root / f"{MANIFEST_NAME}.{token}.tmp"
    try:
        host = {name: to_host(array) for name, array in arrays.items()}
        needed = sum(array.nbytes for array in host.values()) + sum(len(raw) for raw in files.values())
        directory.check_space(root, needed)
        data.mkdir()
        for name, raw in files.items():
            target = data / "files" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(raw)
        save_arrays(data / "arrays", host)
        manifest = Manifest(
            library={name: _version(name) for name in _LIBRARIES},
            data=data.name,
            arrays={name: array_entry(array, host[name]) for name, array in arrays.items()},
            files=directory.sync_tree(data),
            content=content,
        )
        directory.write_synced(temporary, encode(manifest))
        directory.sync_directory(root)
        os.replace(temporary, root / MANIFEST_NAME)
        directory.sync_directory(root)
        directory.sync_directory(root.parent)
    except BaseException:
        if not _is_current(root, data.name):
            shutil.rmtree(data, ignore_errors=True)
            temporary.unlink(missing_ok=True)
        raise
    directory.remove_leftovers(root, keep=data.name)


def _is_current(root: Path, data_name: str) -> bool:
    """Whether any4.json names `data_name`: an interrupt may come right after the rename."""
    try:
        return read_manifest(root).data == data_name
    except (ValueError, OSError):
        return False


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
