"""HTML pages that need nothing else: tables, and pictures as data within the page."""

import base64
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from any4_jax.evaluation.drawing import as_png

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
img { max-width: 100%; height: auto }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
thead th { border-bottom: 2px solid #999; vertical-align: bottom }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A page of these parts, which are HTML, below its title."""
    start = "<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    start += f"\n<title>{escape(title)}</title><link rel=icon href='data:,'><style>{_STYLE}</style></head>\n"
    return f"{start}<body>\n" + "\n".join([f"<h1>{escape(title)}</h1>", *parts]) + "\n</body></html>\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, the first column to the left."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f"<div class=wide><table><thead>{line(head, 'th')}</thead>\n<tbody>{body}</tbody></table></div>"


def image(figure: Any, words: str) -> str:
    """A matplotlib figure, with words for those who don't see it."""
    return f'<img alt="{escape(words)}" src="data:image/png;base64,{base64.b64encode(as_png(figure)).decode()}">'


def decibels(level: float) -> str:
    """A signal-to-noise ratio as text; without noise it is infinite."""
    return f"{level:.2f}" if math.isfinite(level) else "exact"
