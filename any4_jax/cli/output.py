"""The output of commands: aligned tables on stdout, progress on stderr."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm


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
    """Moves a bar when called with (done, total) or (done, total, what)."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar

    def __call__(self, done: int, total: int, what: str = "") -> None:
        self._bar.total = total
        self._bar.set_postfix_str(what, refresh=False)
        self._bar.update(done - self._bar.n)


@contextmanager
def progress(title: str, unit: str) -> Iterator[Progress]:
    """A bar on stderr, shown only on a terminal and erased at the end."""
    with tqdm(desc=title, unit=unit, file=sys.stderr, disable=None, leave=False) as bar:
        yield Progress(bar)
