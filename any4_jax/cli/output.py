"""The output of commands: aligned tables or JSON on stdout, progress on stderr."""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Any, TextIO

from tqdm import tqdm

from any4_jax.cli.interrupts import check

SECONDS_BETWEEN_LINES = 10
# A list of numbers over several lines; in JSON, no text has a line break of its own.
_NUMBERS = re.compile(r"\[\n\s+([-+.\deE,\snul]*?)\s*\]")
# Where --json prints; None without it.
_JSON: ContextVar[TextIO | None] = ContextVar("json", default=None)


@contextmanager
def only_json(asked: bool) -> Iterator[None]:
    """In the body, if asked, stdout gets what commands `tell` and nothing of what they print for people."""
    if not asked:
        yield
        return
    token = _JSON.set(sys.stdout)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        _JSON.reset(token)


def tell(content: Callable[[], Mapping[str, Any]], indent: int | None = 2) -> None:
    """Prints what a command found as a JSON object, if --json asks for it; without `indent`, on one line."""
    file = _JSON.get()
    if file is not None:
        print(as_json(content(), indent), file=file, flush=True)


def as_json(content: Any, indent: int | None = 2) -> str:
    """A value as JSON, its lists of numbers on one line each. What is no finite number, which JSON can't hold, is
    null."""
    text = json.dumps(_finite(content), indent=indent, allow_nan=False, ensure_ascii=False)
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are aligned by spaces: the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def megabytes(count: int) -> str:
    """A number of bytes, as text in units of 10**6."""
    return f"{count / 1e6:.{3 if count < 1e6 else 1}f}"


class Progress:
    """Tells how far the work is when called with (done, total) or (done, total, what).

    It does so on a terminal by a bar, elsewhere by a line now and then. Each call also raises an interrupt that a
    callback swallowed.
    """

    def __init__(self, title: str, unit: str, bar: tqdm) -> None:
        self._title, self._unit, self._bar = title, unit, bar
        self._begin = self._told = time.monotonic()

    def __call__(self, done: int, total: int, what: str = "") -> None:
        check()
        self._bar.total = total
        self._bar.set_postfix_str(what, refresh=False)
        self._bar.update(done - self._bar.n)
        now = time.monotonic()
        if self._bar.disable and 0 < done < total and now - self._told >= SECONDS_BETWEEN_LINES:
            self._told = now
            left = (now - self._begin) * (total - done) / done
            print(
                f"{self._title}: {done} of {total} {self._unit}s, about {duration(left)} left",
                file=sys.stderr,
                flush=True,
            )


def duration(seconds: float) -> str:
    """A rough duration, as text."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextmanager
def progress(title: str, unit: str) -> Iterator[Progress]:
    """Progress on stderr: a bar that is erased at the end, or lines where stderr is no terminal."""
    with tqdm(desc=title, unit=unit, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False) as bar:
        yield Progress(title, unit, bar)
