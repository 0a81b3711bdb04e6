"""An analysis as one HTML page that needs nothing else: tables, and the pictures as data within it."""

import math
from html import escape

from any4_jax.evaluation.analysis import Analysis, LayerAnalysis
from any4_jax.evaluation.analysis_plots import block_and_kind, heat_maps, row_plot
from any4_jax.evaluation.analysis_summary import summary
from any4_jax.evaluation.html_page import decibels, image, page, table

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
        f"<p>{len(layers)} layers, each quantized by each method apart from the others. SQNR is the signal-to-noise "
        f"ratio in decibels: 6 dB more is an error half as large. Outputs are those for {escape(inputs)}.</p>",
        "<h2>Methods</h2>",
        table(
            ["method", "bits per weight", "SQNR of weights (dB)", "SQNR of outputs (dB)", "nearest in"],
            [
                [label, f"{s['bits_per_weight']:.3f}", decibels(s["weights_sqnr_db"]), decibels(s["output_sqnr_db"])]
                + [f"{s['nearest_in_layers']:.0f} layers"]
                for label, s in summary(layers).items()
            ],
        ),
    ]
    if any(block_and_kind(each.path) for each in layers):
        parts += ["<h2>Layers by block and kind</h2>", image(heat_maps(layers), "heat maps of SQNR")]
    if analysis.row is not None:
        parts += ["<h2>A row and its levels</h2>", image(row_plot(analysis.row), "a histogram and levels")]
    head = ["layer", "shape", "mean", "std", "min", "max", "kurtosis", "entropy"]
    for label in layers[0].methods:
        head += [f"{label}: {name}" for name in ("code bits", "weights dB", "uniform dB", "normal dB")]
        head += [] if text is None else [f"{label}: text dB"]
    parts += ["<h2>Every layer</h2>", _NOTE, table(head, [_row(each) for each in layers])]
    return page(title, parts)


def _row(each: LayerAnalysis) -> list[str]:
    w = each.weights
    cells = [each.path, " x ".join(map(str, w.shape)), *(f"{x:.4g}" for x in (w.mean, w.std, w.low, w.high))]
    cells += [f"{w.kurtosis:.2f}", f"{w.entropy:.2f}"]
    for loss in each.methods.values():
        kinds = (loss.weights, loss.uniform, loss.normal, loss.calibrated)
        carried = "-" if math.isnan(loss.code_entropy) else f"{loss.code_entropy:.2f}"
        cells += [carried, *(decibels(kind.sqnr) for kind in kinds if kind is not None)]
    return cells
