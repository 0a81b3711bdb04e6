"""Keeps on disk what a run of `quantize_model` has finished, so that a killed run can continue.

    DIR/unit-<32 hex>.safetensors   one result; the digits are the start of the sha256 of its path

A result belongs to a linear, a site or a block. Its file holds the bytes of its arrays as uint8 vectors, and two
entries of metadata:

    description   JSON: path, key, library, operators (as in a checkpoint: a single one under the name "", or by name
                  those that a site or a block changed), notes, arrays {name: [dtype, shape]}
    sha256        hex digest of the description and of the arrays' bytes, in the order of their names

No file is trusted. One that is truncated, damaged, of another kind, of another key (the weights, the data or the
method's fields have changed) or from other versions of the libraries counts as absent, and its result is computed
again. A continued run does not quantize again what was finished, but it runs the quantized blocks again for their
outputs.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import threading
import uuid
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from any4_jax.checkpoint.arrays import check_array, to_host
from any4_jax.checkpoint.operators import operator_from_spec, operator_spec
from any4_jax.methods import Result
from any4_jax.methods.matrices import plain_note

_OURS = re.compile(r"unit-[0-9a-f]{32}\.safetensors(\.[0-9a-f]{12}\.tmp)?")


class PartialStore:
    """Finished results in a directory, to be passed to `quantize_model` as `finished`. Its methods are thread-safe.

    It is a context manager: on entry the directory is created and locked against other runs; on exit it is removed if
    it is empty.

    Attributes:
      reused: how many linears have had their results from `get` so far. The result of a site or a block counts the
        linears that its notes name.
    """

    def __init__(self, directory: str | os.PathLike[str], *, resume: bool = True) -> None:
        """The store is created on entry.

        Args:
          directory: where results are kept; its parent exists.
          resume: whether to use the results that are there; if False, they are removed on entry.
        """
        self._root = Path(directory)
        self._resume = resume
        self._library = _library()
        self._counting = threading.Lock()
        self.reused = 0

    def __enter__(self) -> "PartialStore":
        """Creates and locks the directory.

        Raises:
          OSError: the directory can't be written, or another run is using it.
        """
        try:
            self._root.mkdir(exist_ok=True)
            self._handle = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._remove(temporary_only=self._resume)
        except BlockingIOError:
            os.close(self._handle)
            raise OSError(
                f"another run keeps its results in {self._root}; wait until it is done, or pass another output"
            ) from None
        except OSError as error:
            os.close(self._handle)
            raise self._unwritable(error) from None
        return self

    def __exit__(self, *exception: object) -> None:
        # rmdir leaves a directory that holds results or someone else's files.
        with contextlib.suppress(OSError):
            self._root.rmdir()
        os.close(self._handle)

    def get(self, path: str, key: str) -> Result | None:
        """The result that was put for this path and key, with its arrays on the default device.

        None if there is no undamaged file for this path, this key and these versions of the libraries.
        """
        try:
            result = self._read(path, key)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, safetensors.SafetensorError):
            return None
        with self._counting:
            self.reused += max(1, len(result.notes)) if isinstance(result.operator, Mapping) else 1
        return result

    def put(self, path: str, key: str, result: Result) -> None:
        """Keeps a result, which replaces any earlier one for this path.

        Raises:
          OSError: the disk is full, or the directory can't be written.
          TypeError, ValueError: a checkpoint can't hold one of the result's arrays.
        """
        arrays: dict[str, jax.Array] = {}
        several = isinstance(result.operator, Mapping)
        made = result.operator if several else {"": result.operator}
        specs = {name: operator_spec(one, f"{path}:{name}", arrays) for name, one in made.items()}
        for name, array in arrays.items():
            check_array(name, array)
        description = json.dumps(
            {
                "path": path,
                "key": key,
                "library": self._library,
                "several": several,
                "operators": specs,
                "notes": _plain(result.notes),
                "arrays": {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()},
            }
        )
        parts = {name: to_host(array).reshape(-1).view(np.uint8) for name, array in arrays.items()}
        raw = safetensors.numpy.save(parts, {"description": description, "sha256": _digest(description, parts)})
        file = self._file(path)
        temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            # Not synced to disk: a file that a power cut truncates fails its digest, which costs one result.
            temporary.write_bytes(raw)
            os.replace(temporary, file)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise self._unwritable(error) from None

    def clear(self) -> None:
        """Removes all results, once the checkpoint that they were for is saved."""
        with contextlib.suppress(OSError):  # a file that can't be removed does no harm: the checkpoint is whole
            self._remove()

    def _read(self, path: str, key: str) -> Result:
        if not self._file(path).is_file():
            raise ValueError("there is no regular file, and a named pipe would be waited for")
        with safetensors.safe_open(self._file(path), framework="numpy") as file:
            metadata = file.metadata()
            text = metadata["description"]
            described = json.loads(text)
            wanted = {"path": path, "key": key, "library": self._library}
            if {name: described[name] for name in wanted} != wanted:
                raise ValueError("the result was kept for another model, method or version")
            parts = {name: np.asarray(file.get_tensor(name)) for name in described["arrays"]}
        if any(part.dtype != np.uint8 for part in parts.values()) or metadata["sha256"] != _digest(text, parts):
            raise ValueError("the file is damaged")

        def take(name: str) -> jax.Array:
            dtype, shape = described["arrays"][name]
            return jnp.asarray(parts[name].view(jnp.dtype(dtype)).reshape(shape))

        made = {name: operator_from_spec(spec, take) for name, spec in described["operators"].items()}
        return Result(made if described["several"] else made[""], _plain(described["notes"]))

    def _file(self, path: str) -> Path:
        # The paths of a user's tree may hold any character, and may be too long for a file name.
        return self._root / f"unit-{hashlib.sha256(path.encode()).hexdigest()[:32]}.safetensors"

    def _remove(self, *, temporary_only: bool = False) -> None:
        for name in os.listdir(self._root):
            match = _OURS.fullmatch(name)
            if match and (match[1] or not temporary_only):
                (self._root / name).unlink(missing_ok=True)

    def _unwritable(self, error: OSError) -> OSError:
        return OSError(
            f"can't keep results in {self._root} ({error.strerror}); free some space or make it writable, or pass "
            "another output"
        )


def _plain(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Notes of a linear, or those of several by path."""
    return {name: _plain(note) if isinstance(note, Mapping) else plain_note(note) for name, note in notes.items()}


def _library() -> dict[str, str]:
    """What determines the last bits of a result besides its inputs."""
    try:
        own = version("any4_jax")
    except PackageNotFoundError:
        own = "not installed"
    return {"any4_jax": own, "jax": jax.__version__, "platform": jax.default_backend()}


def _digest(description: str, parts: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(description.encode())
    for name in sorted(parts):
        digest.update(parts[name].data)
    return digest.hexdigest()
