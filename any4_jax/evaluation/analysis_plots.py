"""Pictures of an analysis: what is lost by layer and kind, and where a row's weights and its levels are."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from any4_jax.evaluation.analysis import LayerAnalysis, RowLevels
from any4_jax.evaluation.analysis_summary import summary
from any4_jax.evaluation.drawing import COLOURS, SCALE, new_figure

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
_MOST_NUMBERS = 40
"""Blocks up to which each cell of a heat map has its number."""


def heat_maps(layers: Sequence[LayerAnalysis]) -> Any:
    """A figure with a heat map for each method: the signal-to-noise ratio (dB) of each layer's output, by block and
    kind. One scale of colours serves all, so that they can be compared.

    Raises:
      ImportError: there is no matplotlib.
      ValueError: no layer is of a numbered block.
    """
    placed = {path: place for path in (each.path for each in layers) if (place := block_and_kind(path)) is not None}
    if not placed:
        raise ValueError(
            f"got the layers {[each.path for each in layers][:3]}, and those of numbered blocks are needed"
        )
    numbers = sorted({number for number, _ in placed.values()})
    kinds = list(dict.fromkeys(kind for _, kind in placed.values()))
    methods = list(layers[0].methods)
    grids = np.full((len(methods), len(numbers), len(kinds)), np.nan)
    for each in layers:
        if each.path in placed:
            number, kind = placed[each.path]
            for grid, method in zip(grids, methods, strict=True):
                grid[numbers.index(number), kinds.index(kind)] = each.methods[method].output.sqnr
    shown = np.where(np.isfinite(grids), grids, np.nan)
    low, high = np.nanmin(shown), np.nanmax(shown)
    bits = summary(layers)
    tall = 0.26 if len(numbers) <= _MOST_NUMBERS else 0.1
    figure = new_figure(1.8 + 0.45 * max(len(kinds), 4) * len(methods), 2.1 + tall * max(len(numbers), 6))
    axes = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for each, grid, method in zip(axes, shown, methods, strict=True):
        picture = each.imshow(grid, cmap=SCALE, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        each.set_title(f"{method}, {bits[method]['bits_per_weight']:.2f} bits", fontsize="medium")
        each.set_xticks(range(len(kinds)), _short(kinds), rotation=90, fontsize="small")
        each.set_facecolor("0.85")
        if len(numbers) <= _MOST_NUMBERS:
            each.set_yticks(range(len(numbers)), numbers, fontsize="small")
            for (i, j), level in np.ndenumerate(grid):
                if np.isfinite(level):
                    light = level > (low + high) / 2
                    each.text(j, i, f"{level:.0f}", ha="center", va="center", size=7, color="k" if light else "w")
    axes[0].set_ylabel("block")
    measured = all(loss.calibrated is not None for each in layers for loss in each.methods.values())
    inputs = "inputs of the text" if measured else "normal inputs"
    figure.colorbar(picture, ax=axes, label="SQNR of the output (dB)", pad=0.01, aspect=30)
    figure.suptitle(f"Signal-to-noise ratio of each layer's output, {inputs}", fontsize="medium")
    return figure


def row_plot(row: RowLevels) -> Any:
    """A figure with the histogram of a row's weights, and below it the levels of each method.

    Raises:
      ImportError: there is no matplotlib.
    """
    figure = new_figure(8.4, 2.9 + 0.35 * len(row.levels))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(5, 0.6 + 0.8 * len(row.levels)))
    above.hist(row.weights, bins=min(80, max(10, len(row.weights) // 8)), color="0.75", edgecolor="0.6", linewidth=0.5)
    above.set_ylabel("number of weights")
    above.set_title(f"row {row.index} of {row.path}, {len(row.weights):,} weights, as one group", fontsize="medium")
    for place, levels in enumerate(row.levels.values()):
        below.eventplot(levels, lineoffsets=-place, linelengths=0.8, linewidths=2, colors=COLOURS[place % 7])
    below.set_yticks([-place for place in range(len(row.levels))], list(row.levels))
    below.set_xlabel("weight")
    below.set_ylabel("levels")
    below.set_ylim(-len(row.levels) + 0.4, 0.6)
    return figure


def _short(kinds: Sequence[str]) -> list[str]:
    """The last names of kinds, where these tell them apart."""
    names = [kind.rpartition(".")[2] for kind in kinds]
    return names if len(set(names)) == len(names) else list(kinds)


def block_and_kind(path: str) -> tuple[int, str] | None:
    """The number of a layer's block and its name there: 3 and "mlp.up_proj" of "layers.3.mlp.up_proj"; None for layers
    outside of numbered blocks."""
    found = _NUMBER.search(path)
    return None if found is None else (int(found[1]), path[found.end() :])
