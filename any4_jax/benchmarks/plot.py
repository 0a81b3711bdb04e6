"""Line plots as SVG, which is text and so needs no plotting library: how fast products are, how far models are off."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, LEGEND = 860, 460, 70, 40, 200
# Okabe and Ito's palette, which colour-blind readers can distinguish too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("", "6 3", "2 3")
WORST = 2.0
"""The largest KL of quality_plot: a model that is farther off writes no sentence, however far."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis of a plot.

    Attributes:
      title: the text beside it.
      low, high: the values at its ends, low < high unless all points share one.
      ticks: the values that get a grid line and a number.
      logarithmic: whether equal distances are equal ratios; all values are then above 0.
      marked: a value with a darker grid line; None for none.
    """

    title: str
    low: float
    high: float
    ticks: Sequence[float]
    logarithmic: bool = False
    marked: float | None = None

    def at(self, value: float) -> float:
        """Where a value is, 0 at the low end and 1 at the high end."""
        scale = math.log if self.logarithmic else float
        return (scale(value) - scale(self.low)) / max(scale(self.high) - scale(self.low), 1e-9)


@dataclasses.dataclass(frozen=True)
class Style:
    """How a line is drawn.

    Attributes:
      colour: of the line and its dots.
      dashes: an SVG stroke-dasharray; "" for a solid line.
      dots: what its points get: "none", "full" or "hollow" dots.
    """

    colour: str
    dashes: str = ""
    dots: str = "none"


def line_plot(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    x_axis: Axis,
    y_axis: Axis,
    title: str,
    styles: Mapping[str, Style] | None = None,
) -> str:
    """An SVG plot with a line for each name, which the legend lists in their order.

    Args:
      lines: (x, y) by the name of a line; they are joined in the order of x.
      x_axis, y_axis: they contain all points.
      title: the text above the plot.
      styles: by the name of a line; None draws lines without dots, in colours as they come.
    """
    right, low = WIDTH - LEGEND, HEIGHT - 50

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return LEFT + (right - LEFT) * x_axis.at(point[0]), low - (low - TOP) * y_axis.at(point[1])

    parts = [_text(LEFT, 22, title, "start", 15), _text((LEFT + right) / 2, HEIGHT - 12, x_axis.title, "middle")]
    if y_axis.title:
        parts.append(_text(14, (TOP + low) / 2, y_axis.title, "middle", turned=True))
    for tick in x_axis.ticks:
        x = place((tick, y_axis.low))[0]
        parts += [
            _line([(x, TOP), (x, low)], _grid(x_axis, tick, "#eeeeee")),
            _text(x, low + 18, f"{tick:g}", "middle"),
        ]
    for tick in y_axis.ticks:
        y = place((x_axis.low, tick))[1]
        parts += [_line([(LEFT, y), (right, y)], _grid(y_axis, tick, "#dddddd"))]
        parts += [_text(LEFT - 8, y + 4, f"{tick:g}", "end")]
    for number, (name, line) in enumerate(lines.items()):
        style, at = _plain(number) if styles is None else styles[name], TOP + 8 + 18 * number
        places = [place(point) for point in sorted(line)]
        ends = [(right + 20, at), (right + 60, at)]
        parts += [_line(way, style.colour, 2, style.dashes) for way in (places, ends)]
        parts += [_dot(x, y, style) for x, y in [*places, (right + 40, at)] if style.dots != "none"]
        parts += [_text(right + 66, at + 4, name, "start")]
    # Room for all of the legend, and for the title; a letter of size 12 is about 7 wide.
    letters = max((7 * len(name) for name in lines), default=0)
    width = max(WIDTH, right + 66 + letters, LEFT + 9 * len(title))
    height = max(HEIGHT, TOP + 18 * len(lines) + 8)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def speed_plot(rows: Sequence[Mapping[str, Any]], product: str, ratio: str, title: str) -> str:
    """An SVG plot of a product's speed against the number of rows of x, one line per shape; both axes are logarithmic.

    Args:
      rows: the rows of `any4 bench gemm` on a GPU.
      product: the "product" of the rows to plot.
      ratio: the key of the value to plot, such as "speed_ratio_to_cublas"; rows in which it is None are left out.
      title: the text above the plot.

    Raises:
      ValueError: no row is left to plot.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["product"] == product and row[ratio] is not None:
            lines.setdefault(f"{row['n']} x {row['k']}", []).append((row["m"], row[ratio]))
    if not lines:
        raise ValueError(f"no row of {product!r} has a {ratio}, and the plot needs one; measure it first")
    counts = sorted({m for line in lines.values() for m, _ in line})
    speeds = [speed for line in lines.values() for _, speed in line]
    first, last = math.floor(math.log2(min(speeds))), math.ceil(math.log2(max(speeds)))
    levels = [2.0**power for power in range(first, last + 1)]
    x_axis = Axis("rows of x", counts[0], counts[-1], counts, logarithmic=True)
    return line_plot(lines, x_axis, Axis("", levels[0], levels[-1], levels, logarithmic=True, marked=1), title)


def decode_plot(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """An SVG plot of tokens per second, of all rows of a batch together, against the length of the prompt
    (logarithmic): a line for each kind of model and batch.

    Args:
      rows: the rows of `any4 bench decode`, at least one.
      title: the text above the plot.
    """
    kinds = ("model", "method", "head", "dtype", "batch")
    differing = [kind for kind in kinds if len({row[kind] for row in rows}) > 1] or ["method"]
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        words = [f"batch {row[kind]}" if kind == "batch" else str(row[kind]) for kind in differing]
        lines.setdefault(", ".join(words), []).append((row["prompt_tokens"], row["decode_tokens_per_s"]))
    contexts = sorted({row["prompt_tokens"] for row in rows})
    x_axis = Axis("tokens of the prompt", contexts[0], contexts[-1], contexts, logarithmic=True)
    y_axis = _from_zero("tokens per second", max(row["decode_tokens_per_s"] for row in rows))
    return line_plot(lines, x_axis, y_axis, title, _dotted(lines))


def cache_plot(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """An SVG plot of the milliseconds of a step against the tokens of the context (logarithmic), a line for each cache:
    of the whole step where it was measured, else of attention alone.

    Args:
      rows: the rows of `any4 bench cache`, at least one.
      title: the text above the plot.
    """
    kind, words = ("attention_ms", "ms of attention") if rows[0]["step_ms"] is None else ("step_ms", "ms of a step")
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row["cache"], []).append((row["context"], row[kind]))
    contexts = sorted({row["context"] for row in rows})
    x_axis = Axis("tokens of the context", contexts[0], contexts[-1], contexts, logarithmic=True)
    return line_plot(lines, x_axis, _from_zero(words, max(row[kind] for row in rows)), title, _dotted(lines))


def quality_plot(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """An SVG plot of the KL from the float model (logarithmic) against bits per weight, one line per method.

    A table has one colour. With GPTQ's codes its line and dots are solid; with the nearest ones the line is dashed and
    the dots are hollow. Rows with a KL above WORST are left out.

    Args:
      rows: rows of ablations.py. Those whose "case" is the same up to ", groups of" or ", whole rows" share a line.
      title: the text above the plot.

    Raises:
      ValueError: a row has no KL above 0, or none is left to plot.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name = row["case"].split(", groups of ")[0].removesuffix(", whole rows")
        if not row["kl_nats"] > 0:
            raise ValueError(f"{row['case']} has a KL of {row['kl_nats']}, and a logarithm needs one above 0; drop it")
        if row["kl_nats"] <= WORST:
            lines.setdefault(name, []).append((row["bits_per_weight"], row["kl_nats"]))
    if not lines:
        raise ValueError(
            f"got no row to plot, need at least one with a KL of at most {WORST:g}; measure some with ablations.py"
        )
    tables = sorted({name.removeprefix("GPTQ ") for name in lines})
    colours = {table: COLOURS[number % len(COLOURS)] for number, table in enumerate(tables)}
    styles = {
        name: Style(colours[table], dashes, dots)
        for table in tables
        for name, dashes, dots in ((f"GPTQ {table}", "", "full"), (table, "5 4", "hollow"))
        if name in lines
    }
    bits, found = ([point[axis] for line in lines.values() for point in line] for axis in (0, 1))
    first, last = math.floor(2 * min(bits)), max(math.ceil(2 * max(bits)), math.floor(2 * min(bits)) + 1)
    x_axis = Axis("bits per weight", first / 2, last / 2, [half / 2 for half in range(first, last + 1)])
    levels = [digit * 10.0**power for power in range(-9, 9) for digit in (1, 2, 5)]
    below = sum(level <= min(found) for level in levels)
    above = max(sum(level < max(found) for level in levels), below)
    levels = levels[below - 1 : above + 1]
    y_axis = Axis("KL from the float model, nats per token", levels[0], levels[-1], levels, logarithmic=True)
    return line_plot({name: lines[name] for name in styles}, x_axis, y_axis, title, styles)


def _from_zero(title: str, highest: float) -> Axis:
    """An axis from 0 to a round number not below the highest value, which is above 0."""
    power = 10.0 ** math.floor(math.log10(highest))
    step = next(digit * power / 10 for digit in (1, 2, 5, 10) if 10 * digit * power / 10 >= highest)
    ticks = [step * count for count in range(math.ceil(highest / step) + 1)]
    return Axis(title, 0, ticks[-1], ticks)


def _dotted(lines: Mapping[str, Any]) -> dict[str, Style]:
    return {name: dataclasses.replace(_plain(i), dots="full") for i, name in enumerate(lines)}


def _plain(number: int) -> Style:
    """The style of the line with this number, which no other of the first 21 has."""
    return Style(COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)])


def _grid(axis: Axis, tick: float, colour: str) -> str:
    return "#999999" if tick == axis.marked else colour


def _line(points: Sequence[tuple[float, float]], colour: str, width: int = 1, dashes: str = "") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dashes}"/>'
    )


def _dot(x: float, y: float, style: Style) -> str:
    fill = "white" if style.dots == "hollow" else style.colour
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{fill}" stroke="{style.colour}" stroke-width="1.5"/>'


def _text(x: float, y: float, text: str, anchor: str, size: int = 12, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{turn}>{escape(text)}</text>'
