"""Keeps a write by Orbax that fails from printing tracebacks, and from going on after it has failed."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# tensorstore's threads have nothing left to write once a folder has been at rest for so long. A slower disk loses only
# tidiness: the next save removes what they left.
_REST_SECONDS = 0.2
_PATIENCE_SECONDS = 10.0


@contextlib.contextmanager
def reported_once(folder: Path) -> Iterator[None]:
    """While the body writes to `folder`, its failure is told by what it raises, and by nothing else.

    Orbax's threads log the exceptions that their waiter raises. When one array can't be written, Orbax closes its event
    loop while tensorstore's threads still write other arrays: they would say that the loop is closed, and make the
    folder anew after its removal. So an exception passes once they are done. Where several arrays can't be written, the
    futures of all but one are dropped with their exceptions, which asyncio logs whenever they are collected. All other
    messages pass.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook

    def unraisable(what: Any) -> None:
        if not (isinstance(what.exc_value, RuntimeError) and "Event loop is closed" in str(what.exc_value)):
            hook(what)

    logger.addFilter(_is_news)
    sys.unraisablehook = unraisable
    try:
        yield
    except BaseException:
        logging.getLogger("asyncio").addFilter(_Told(folder))
        _await_rest(folder)
        raise
    finally:
        sys.unraisablehook = hook
        logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record says more than that a thread of Orbax ended with an exception."""
    return "raised an exception" not in record.getMessage() or "orbax" not in record.pathname


class _Told(logging.Filter):
    """Drops what asyncio says of futures whose writes to a folder failed. It stays, since they are collected late."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = str(folder.absolute())

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record says anything else."""
        error = record.exc_info[1] if record.exc_info else None
        return "never retrieved" not in record.getMessage() or self._folder not in str(error)


def _await_rest(folder: Path) -> None:
    """Waits until nothing in `folder` changes."""
    begin, seen = time.monotonic(), None
    while time.monotonic() - begin < _PATIENCE_SECONDS:
        # os.walk passes over what is removed meanwhile.
        found = list(os.walk(folder))
        if found == seen:
            return
        seen = found
        time.sleep(_REST_SECONDS)
