"""The output of commands: aligned tables on stdout, progress on stderr."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from any4_jax.cli.interrupts import check

SECONDS_BETWEEN_LINES = 10


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
