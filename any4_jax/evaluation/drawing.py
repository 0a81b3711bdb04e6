"""Pictures by matplotlib, which the extra `plot` installs, in colours that colour-blind readers can distinguish."""

import io
import os
import textwrap
from typing import Any

from any4_jax.whole_file import write_whole

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
"""Okabe and Ito's palette, with a grey in place of its yellow, which is too light for lines."""
MARKERS = "os^Dv<>P"
SCALE = "cividis"
"""A scale of colours that people who confuse red and green see as everyone else does."""


def check_matplotlib() -> None:
    """Raises ImportError, in one sentence, if there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(
            "a picture needs the package matplotlib, which isn't installed; run pip install 'any4_jax[plot]'"
        ) from None


def new_figure(width: float, height: float, **settings: Any) -> Any:
    """An empty figure, sizes in inches, whose parts make room for each other.

    Raises:
      ImportError: there is no matplotlib.
    """
    check_matplotlib()
    # The object, not pyplot, which would choose a window system and keep every figure.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", **settings)


def set_title(axes: Any, title: str, width: int) -> None:
    """A title in lines of at most `width` characters; none if it is empty."""
    if title:
        axes.set_title(textwrap.fill(title, width), fontsize="medium")


def as_png(figure: Any) -> bytes:
    """The figure as a PNG, 150 pixels an inch."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150, format="png")
    return drawn.getvalue()


def write_png(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes the figure as a PNG, whole or not at all.

    Raises:
      OSError: the file can't be written.
    """
    write_whole(path, as_png(figure))
