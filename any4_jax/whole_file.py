"""Files of results, drawings and statistics: each is written as a whole or not at all."""

import os
from pathlib import Path


def check_target(path: str | os.PathLike[str]) -> None:
    """Raises OSError, in one sentence, where `write_whole` could not write: call it before the work."""
    target = Path(path).absolute()
    if not target.parent.is_dir():
        raise OSError(f"{path} can't be written because its folder is missing; create it first")
    if target.exists() and not target.is_file():
        raise OSError(f"{path} is a folder or a device, and a regular file is needed; give another name")
    if not os.access(target.parent, os.W_OK):
        raise OSError(f"{path} can't be written because its folder is read-only here; give another one")


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file, text in UTF-8; what was there stays until the new file is complete.

    Raises:
      OSError: see `check_target`, or the disk is full.
    """
    check_target(path)
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(scratch, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
