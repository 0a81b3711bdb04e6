"""Heat maps: of where needles are found, length by depth."""

import os
from collections.abc import Sequence

from any4_jax.evaluation.drawing import SCALE, new_figure, set_title, write_png
from any4_jax.evaluation.needle import Trial, shares


def heat_map(trials: Sequence[Trial], path: str | os.PathLike[str], title: str = "") -> None:
    """Writes a PNG: the share of needles found at each length (tokens) and depth (percent), as colours and numbers.

    Raises:
      ImportError: there is no matplotlib.
      OSError: the file can't be written.
    """
    lengths, depths, found = shares(trials)
    keys = len({trial.key for trial in trials})
    figure = new_figure(2.4 + 0.7 * max(len(lengths), 3), 1.9 + 0.45 * max(len(depths), 3))
    axes = figure.add_subplot()
    picture = axes.imshow(100 * found, cmap=SCALE, vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:g}" for depth in depths])
    axes.set_xlabel("length of the prompt (tokens)")
    axes.set_ylabel("depth of the needle (% of the text)")
    for i, row in enumerate(found):
        for j, share in enumerate(row):
            axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", color="black" if share > 0.5 else "white")
    needles = "1 needle" if keys == 1 else f"{keys} needles"
    figure.colorbar(picture, label=f"found, of {needles} (%)")
    set_title(axes, title, 48)
    write_png(figure, path)
