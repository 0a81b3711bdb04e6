"""Bar charts as SVG: figures that belong to names and follow no axis."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, BAR, GAP, TOP, VALUE = 860, 16, 6, 44, 150
COLOUR, ERROR = "#0072B2", "#000000"
_LETTER = 6.6
"""About the width of a letter of size 12."""
_LONGEST = 64


class Bar(NamedTuple):
    """A bar: what stands beside it, its value, of at least 0, and the standard error of that, if it is known."""

    label: str
    value: float
    error: float | None = None


def bar_plot(bars: Sequence[Bar], unit: str, title: str) -> str:
    """An SVG chart of horizontal bars from 0, with their values beside them, one below the other.

    Args:
      bars: at least one; labels of more than 64 letters are cut.
      unit: what the values are in, below the title.
      title: the text above the chart.

    Raises:
      ValueError: there is no bar, or a value is negative.
    """
    if not bars or min(bar.value for bar in bars) < 0:
        raise ValueError("got no bars, or one below 0, and a chart needs bars from 0 up; leave the others out")
    labels = [bar.label if len(bar.label) <= _LONGEST else f"{bar.label[: _LONGEST - 3]}..." for bar in bars]
    left = 20 + _LETTER * max(map(len, labels))
    width = max(WIDTH, left + 2 * VALUE, _LETTER * 1.3 * len(title))
    room = width - left - VALUE
    highest = max(bar.value + (bar.error or 0) for bar in bars) or 1.0
    height = TOP + (BAR + GAP) * len(bars) + 10
    parts = [_text(10, 18, title, "start", 15), _text(10, 36, unit, "start")]
    for number, (bar, label) in enumerate(zip(bars, labels, strict=True)):
        y, length = TOP + (BAR + GAP) * number, room * bar.value / highest
        parts.append(_text(left - 8, y + 12.5, label, "end"))
        parts.append(f'<rect x="{left:.1f}" y="{y}" width="{max(length, 0.5):.1f}" height="{BAR}" fill="{COLOUR}"/>')
        words, end = f"{bar.value:.4g}", length
        if bar.error:
            low, end = (room * (bar.value + sign * bar.error) / highest for sign in (-1, 1))
            words += f" ± {bar.error:.2g}"
            middle = y + BAR / 2
            parts.append(
                f'<path d="M{left + max(low, 0):.1f} {middle}H{left + end:.1f}M{left + end:.1f} {middle - 4}v8" '
                f'stroke="{ERROR}" stroke-width="1.5" fill="none"/>'
            )
        parts.append(_text(left + end + 6, y + 12.5, words, "start"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" font-family="sans-serif">\n'
        f'<rect width="{width:.0f}" height="{height}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
