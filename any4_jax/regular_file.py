"""Only regular files are read: a named pipe would make its reader wait for ever."""

import stat
from pathlib import Path

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(path: Path) -> int:
    """The size in bytes of a regular file, or of one that a link leads to. Nothing is opened.

    Raises:
        FileNotFoundError: there is no such file.
        PermissionError: its folder may not be searched.
        ValueError: it is a folder, a named pipe, a socket or a device.
    """
    try:
        found = path.stat()
    except PermissionError:
        raise
    except (OSError, ValueError) as error:  # ValueError: the name holds characters that no file's name can
        reason = getattr(error, "strerror", None) or str(error)
        raise FileNotFoundError(f"{str(path)!r} can't be found ({reason}); check the name, or fetch it") from None
    kind = irregular(found.st_mode)
    if kind is None:
        return found.st_size
    raise ValueError(f"{path} is {kind}, and a regular file is needed; put the file itself there")


def irregular(mode: int) -> str | None:
    """What a file with this `st_mode` is; None if it is a regular file."""
    if stat.S_ISREG(mode):
        return None
    return next((words for matches, words in _KINDS if matches(mode)), "no file")


def read_regular(path: Path) -> bytes:
    """The content of a regular file.

    Raises:
        OSError, ValueError: see `check_regular`; or reading fails.
    """
    check_regular(path)
    return path.read_bytes()
