"""A picture of how errors grow from block to block."""

import math
import os
from collections.abc import Sequence
from typing import Any

from any4_jax.evaluation.drawing import COLOURS, MARKERS, new_figure, set_title, write_png
from any4_jax.evaluation.layer_errors import LayerError, LayerErrors


def error_plot(errors: LayerErrors, path: str | os.PathLike[str], title: str = "") -> None:
    """Writes the picture of `error_figure` as a PNG.

    Raises:
      ImportError: there is no matplotlib.
      OSError: the file can't be written.
    """
    write_png(error_figure(errors, title), path)


def error_figure(errors: LayerErrors, title: str = "") -> Any:
    """A figure: the signal-to-noise ratio (dB) of the outputs of blocks, and of each kind of linear, by the number of
    the block. Outputs without an error have no place on it.

    Raises:
      ImportError: there is no matplotlib.
    """
    figure = new_figure(8.4, 4.6)
    axes = figure.add_subplot()
    numbers = range(len(errors.blocks))
    for place, (kind, layers) in enumerate(by_kind(errors).items()):
        style = {"color": COLOURS[place % 7], "marker": MARKERS[place % 8], "markersize": 4, "linewidth": 1}
        axes.plot([number for number, _ in layers], _levels([each for _, each in layers]), label=kind, **style)
    axes.plot(numbers, _levels(errors.blocks), color="black", linewidth=2.5, label="output of the block")
    own = _levels(errors.blocks, own=True)
    axes.plot(numbers, own, color="black", linewidth=1.5, linestyle="--", label="with its own errors alone")
    axes.set_xlabel("block")
    axes.set_ylabel("signal-to-noise ratio of the output (dB)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    set_title(axes, title, 80)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure


def by_kind(errors: LayerErrors) -> dict[str, list[tuple[int, LayerError]]]:
    """The linears of blocks by what they are called in their block, each with the number of its block."""
    kinds: dict[str, list[tuple[int, LayerError]]] = {}
    for number, block in enumerate(errors.blocks):
        prefix = f"{block.path}."
        for each in errors.linears:
            if each.path.startswith(prefix):
                kinds.setdefault(each.path.removeprefix(prefix), []).append((number, each))
    return kinds


def _levels(layers: Sequence[LayerError], *, own: bool = False) -> list[float]:
    levels = [(each.own if own else each.total).sqnr for each in layers]
    return [level if math.isfinite(level) else math.nan for level in levels]
