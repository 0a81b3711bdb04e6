"""The directory of a checkpoint: the names in it, its lock, flushing it to disk, and links that lead out of it."""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from any4_jax.checkpoint.manifest import DATA_NAME, FileEntry
from any4_jax.regular_file import irregular

MANIFEST_NAME = "any4.json"
_TEMPORARY_NAME = re.compile(r"any4\.json\.[0-9a-f]{12}\.tmp")


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the lock of `root` during the body; create `root` if it is missing, and remove it again if the body fails.

    The lock is on the directory itself: it leaves no file behind, and the kernel releases it if the process is killed.

    Raises:
      FileNotFoundError: the parent of `root` doesn't exist.
      FileExistsError: `root` is a file, or holds something other than a checkpoint.
      BlockingIOError: another save holds the lock.
      OSError: `root` can't be written or locked.
    """
    if not root.parent.is_dir():
        raise FileNotFoundError(f"checkpoint {root} can't be made: {root.parent} is not a directory; create it first")
    if root.exists() and not root.is_dir():
        raise FileExistsError(f"{root} is a file; pass a new or empty directory for the checkpoint")
    made = not root.exists()
    try:
        root.mkdir(exist_ok=True)
        handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OSError(
            f"can't write checkpoint {root} ({error.strerror}); pass a directory that you can write to"
        ) from None
    try:
        _lock(handle, root)
        names = set(os.listdir(root))
        if names and MANIFEST_NAME not in names and not any(map(_is_leftover, names)):
            raise FileExistsError(
                f"{root} is not empty, and holds no any4_jax checkpoint; pass a new or empty directory"
            )
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                root.rmdir()
        raise
    finally:
        os.close(handle)


def _lock(handle: int, root: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(f"another save to checkpoint {root} is running; wait until it is done") from None
    except OSError as error:
        raise OSError(
            f"can't lock checkpoint {root} ({error.strerror}); pass a directory on a file system that has locks"
        ) from None


def remove_leftovers(root: Path, keep: str) -> None:
    """Remove what earlier saves left in `root`, except any4.json and the data directory `keep`.

    Anything that can't be removed is left to the next save: the checkpoint is whole either way.
    """
    for name in os.listdir(root):
        if not _is_leftover(name) or name == keep:
            continue
        if DATA_NAME.fullmatch(name):
            shutil.rmtree(root / name, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                (root / name).unlink()


def check_space(root: Path, needed: int) -> None:
    """Raise OSError unless `needed` bytes are free: cheaper and clearer than a write that fails halfway."""
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(f"it needs {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free on that disk")


def file_entry(file: Path) -> FileEntry:
    """The size and digest of `file`, which is read in small pieces."""
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return FileEntry(os.fstat(stream.fileno()).st_size, digest.hexdigest())


def sync_tree(directory: Path) -> dict[str, FileEntry]:
    """Flush every file and directory under `directory` to disk; returns {relative path: entry} of its files."""
    entries = {}
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            file = Path(folder) / name
            entries[file.relative_to(directory).as_posix()] = file_entry(file)
            _sync(file, os.O_RDONLY)
        sync_directory(Path(folder))
    return entries


def sync_directory(directory: Path) -> None:
    """Flush the names in `directory` to disk: only then is a new or renamed entry durable."""
    _sync(directory, os.O_RDONLY | os.O_DIRECTORY)


def write_synced(file: Path, raw: bytes) -> None:
    """Write a new file and flush it to disk."""
    with open(file, "xb") as stream:
        stream.write(raw)
        stream.flush()
        os.fsync(stream.fileno())


def inside(root: Path, file: Path) -> Path:
    """`file`, unless it leads out of `root` or is no regular file: a load reads only what was saved, and never waits.

    Raises:
      ValueError: symbolic links lead out of `root` or in a circle, or `file` is a named pipe, a device or a folder.
      OSError: there is no such file.
    """
    name = file.relative_to(root)
    try:
        real = file.resolve()
        mode = file.stat().st_mode
    except (RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ELOOP:
            raise
        raise ValueError(f"checkpoint {root}: {name} is a link to itself; put the file itself there") from None
    if not real.is_relative_to(root.resolve()):
        raise ValueError(f"checkpoint {root}: {name} is a link out of it; put the file itself there")
    if kind := irregular(mode):
        raise ValueError(f"checkpoint {root}: {name} is {kind}, and only regular files are read; put the file there")
    return file


def check_contained(root: Path, folder: Path) -> None:
    """Raises ValueError unless all that is in `folder` is regular files and folders inside of `root`.

    Orbax's arrays are read by a library that opens whatever it finds.
    """
    for where, folders, names in os.walk(folder):
        for name in [*names, *(name for name in folders if os.path.islink(os.path.join(where, name)))]:
            inside(root, Path(where, name))


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_leftover(name: str) -> bool:
    return bool(DATA_NAME.fullmatch(name) or _TEMPORARY_NAME.fullmatch(name))
