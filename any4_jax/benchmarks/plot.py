"""Plots how fast products are relative to a dense one, as SVG, which is text and so needs no plotting library."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, LEGEND = 860, 460, 60, 40, 200
# Okabe and Ito's palette, which colour-blind readers can distinguish too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


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
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["product"] == product and row[ratio] is not None:
            lines.setdefault(f"{row['n']} x {row['k']}", []).append((row["m"], row[ratio]))
    if not lines:
        raise ValueError(f"no row of {product!r} has a {ratio}, and the plot needs one; measure it first")
    points = [point for line in lines.values() for point in line]
    counts = sorted({m for m, _ in points})
    bottom, top = (
        2.0 ** round_(math.log2(f(y for _, y in points))) for f, round_ in ((min, math.floor), (max, math.ceil))
    )
    right, low = WIDTH - LEGEND, HEIGHT - 50

    def x(m: float) -> float:
        return LEFT + (right - LEFT) * math.log(m / counts[0]) / max(math.log(counts[-1] / counts[0]), 1e-9)

    def y(value: float) -> float:
        return low - (low - TOP) * math.log(value / bottom) / max(math.log(top / bottom), 1e-9)

    parts = [_text(LEFT, 22, title, "start", 15), _text((LEFT + right) / 2, HEIGHT - 12, "rows of x", "middle")]
    for m in counts:
        parts += [_line([(x(m), TOP), (x(m), low)], "#eeeeee"), _text(x(m), low + 18, str(m), "middle")]
    level = bottom
    while level <= top:
        parts += [_line([(LEFT, y(level)), (right, y(level))], "#999999" if level == 1 else "#dddddd")]
        parts += [_text(LEFT - 8, y(level) + 4, f"{level:g}", "end")]
        level *= 2
    for number, (name, line) in enumerate(lines.items()):
        colour, dashes = COLOURS[number % len(COLOURS)], ("", "6 3", "2 3")[number // len(COLOURS) % 3]
        at = TOP + 8 + 18 * number
        parts += [_line([(x(m), y(value)) for m, value in sorted(line)], colour, 2, dashes)]
        parts += [
            _line([(right + 20, at), (right + 44, at)], colour, 2, dashes),
            _text(right + 50, at + 4, name, "start"),
        ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _line(points: Sequence[tuple[float, float]], colour: str, width: int = 1, dashes: str = "") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dashes}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
