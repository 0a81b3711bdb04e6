"""An analysis as one HTML page that needs nothing else: tables, and the pictures as data within it."""

import base64
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from any4_jax.evaluation.analysis import Analysis, LayerAnalysis
from any4_jax.evaluation.analysis_plots import block_and_kind, heat_maps, row_plot
from any4_jax.evaluation.analysis_summary import summary
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

_NOTE = (
    "<p>Kurtosis is 0 for normal weights, and larger where a few are far out. Entropy is that of the weights in 256 "
    "equal bins, in bits; code bits are what the codes carry of their width. Uniform inputs are from 0 to 1, normal "
    "ones have mean 0 and variance 1.</p>"
)


def html(analysis: Analysis, title: str, text: str | None) -> str:
    """The page.

    Args:
      analysis: of one layer at least.
      title: what was analyzed.
      text: the name of the text that the model was calibrated on; None for none.

    Raises:
      ImportError: there is no matplotlib.
    """
    layers = analysis.layers
    inputs = "normal inputs" if text is None else f"the inputs that each layer has when the model reads {text}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{len(layers)} layers, each quantized by each method apart from the others. SQNR is the signal-to-noise "
        f"ratio in decibels: 6 dB more is an error half as large. Outputs are those for {escape(inputs)}.</p>",
        "<h2>Methods</h2>",
        _table(
            ["method", "bits per weight", "SQNR of weights (dB)", "SQNR of outputs (dB)", "nearest in"],
            [
                [label, f"{s['bits_per_weight']:.3f}", _db(s["weights_sqnr_db"]), _db(s["output_sqnr_db"])]
                + [f"{s['nearest_in_layers']:.0f} layers"]
                for label, s in summary(layers).items()
            ],
        ),
    ]
    if any(block_and_kind(each.path) for each in layers):
        parts += ["<h2>Layers by block and kind</h2>", _image(heat_maps(layers), "heat maps of SQNR")]
    if analysis.row is not None:
        parts += ["<h2>A row and its levels</h2>", _image(row_plot(analysis.row), "a histogram and levels")]
    head = ["layer", "shape", "mean", "std", "min", "max", "kurtosis", "entropy"]
    for label in layers[0].methods:
        head += [f"{label}: {name}" for name in ("code bits", "weights dB", "uniform dB", "normal dB")]
        head += [] if text is None else [f"{label}: text dB"]
    parts += ["<h2>Every layer</h2>", _NOTE, _table(head, [_row(each) for each in layers])]
    start = "<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    return f"{start}\n<title>{escape(title)}</title><link rel=icon href='data:,'><style>{_STYLE}</style></head>\n" + (
        "<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _row(each: LayerAnalysis) -> list[str]:
    w = each.weights
    cells = [each.path, " x ".join(map(str, w.shape)), *(f"{x:.4g}" for x in (w.mean, w.std, w.low, w.high))]
    cells += [f"{w.kurtosis:.2f}", f"{w.entropy:.2f}"]
    for loss in each.methods.values():
        kinds = (loss.weights, loss.uniform, loss.normal, loss.calibrated)
        carried = "-" if math.isnan(loss.code_entropy) else f"{loss.code_entropy:.2f}"
        cells += [carried, *(_db(kind.sqnr) for kind in kinds if kind is not None)]
    return cells


def _db(level: float) -> str:
    return f"{level:.2f}" if math.isfinite(level) else "exact"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f"<div class=wide><table><thead>{line(head, 'th')}</thead>\n<tbody>{body}</tbody></table></div>"


def _image(figure: Any, words: str) -> str:
    return f'<img alt="{escape(words)}" src="data:image/png;base64,{base64.b64encode(as_png(figure)).decode()}">'
