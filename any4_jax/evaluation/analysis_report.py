"""An analysis as one HTML page that needs nothing else: tables, and the pictures as data within it."""

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from any4_jax.evaluation.analysis import Analysis, LayerAnalysis, MethodLoss
from any4_jax.evaluation.analysis_plots import block_and_kind, heat_maps, row_plot
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


def summary(layers: Sequence[LayerAnalysis]) -> dict[str, dict[str, float]]:
    """For each method, means over the layers: bits per weight by their numbers of weights, the SQNR of weights and
    outputs in dB over the layers that have an error, and the number of layers whose output is nearest by it."""
    weights = [math.prod(each.weights.shape) for each in layers]
    found = {}
    for label in layers[0].methods:
        losses = [each.methods[label] for each in layers]
        bits = sum(n * loss.bits_per_weight for n, loss in zip(weights, losses, strict=True)) / sum(weights)
        best = sum(_nearest(each.methods) == label for each in layers)
        found[label] = {
            "bits_per_weight": bits,
            "weights_sqnr_db": _mean([loss.weights.sqnr for loss in losses]),
            "output_sqnr_db": _mean([loss.output.sqnr for loss in losses]),
            "nearest_in_layers": best,
        }
    return found


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
    inputs = "normal inputs" if text is None else f"the inputs that each layer has for {text}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{len(layers)} layers, each quantized by each method apart from the others. SQNR is the signal-to-noise "
        f"ratio in decibels: 6 dB more is half the error. Outputs are those for {escape(inputs)}.</p>",
        "<h2>Methods</h2>",
        _table(
            ["method", "bits per weight", "SQNR of weights", "SQNR of outputs", "nearest in"],
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
    parts += ["<h2>Every layer</h2>", _table(head, [_row(each) for each in layers])]
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
        cells += [f"{loss.code_entropy:.2f}", *(_db(kind.sqnr) for kind in kinds if kind is not None)]
    return cells


def _nearest(methods: Mapping[str, MethodLoss]) -> str:
    return max(methods, key=lambda label: methods[label].output.sqnr)


def _mean(levels: Sequence[float]) -> float:
    finite = [level for level in levels if math.isfinite(level)]
    return sum(finite) / len(finite) if finite else math.inf


def _db(level: float) -> str:
    return f"{level:.2f}" if math.isfinite(level) else "exact"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f"<div class=wide><table><thead>{line(head, 'th')}</thead>\n<tbody>{body}</tbody></table></div>"


def _image(figure: Any, words: str) -> str:
    return f'<img alt="{escape(words)}" src="data:image/png;base64,{base64.b64encode(as_png(figure)).decode()}">'
