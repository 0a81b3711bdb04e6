"""A picture of where needles are found: length by depth."""

import io
import os
import textwrap
from collections.abc import Sequence

from any4_jax.evaluation.needle import Trial, shares
from any4_jax.whole_file import write_whole


def check_matplotlib() -> None:
    """Raises ImportError, in one sentence, if there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(
            "a heat map needs the package matplotlib, which isn't installed; run pip install 'any4_jax[plot]'"
        ) from None


def heat_map(trials: Sequence[Trial], path: str | os.PathLike[str], title: str = "") -> None:
    """Writes a PNG: the share of needles found at each length (tokens) and depth (percent), as colours and numbers.

    The colours are cividis, which people who confuse red and green see as everyone else does.

    Raises:
      ImportError: there is no matplotlib.
      OSError: the file can't be written.
    """
    check_matplotlib()
    # The object, not pyplot, which would choose a window system and keep every figure.
    from matplotlib.figure import Figure

    lengths, depths, found = shares(trials)
    keys = len({trial.key for trial in trials})
    figure = Figure(figsize=(2.4 + 0.7 * max(len(lengths), 3), 1.9 + 0.45 * max(len(depths), 3)), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(100 * found, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:g}" for depth in depths])
    axes.set_xlabel("length of the prompt (tokens)")
    axes.set_ylabel("depth of the needle (% of the text)")
    for i, row in enumerate(found):
        for j, share in enumerate(row):
            axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", color="black" if share > 0.5 else "white")
    needles = "1 needle" if keys == 1 else f"{keys} needles"
    figure.colorbar(picture, label=f"found, of {needles} (%)")
    if title:
        axes.set_title(textwrap.fill(title, 48), fontsize="medium")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150, format="png")
    write_whole(path, drawn.getvalue())
