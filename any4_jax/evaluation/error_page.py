"""The errors of a model's layers as one HTML page that needs nothing else."""

from collections.abc import Sequence
from html import escape

from any4_jax.evaluation.error_plot import error_figure
from any4_jax.evaluation.html_page import decibels, image, page, table
from any4_jax.evaluation.layer_errors import LayerError, LayerErrors

_HEAD = ["layer", "MSE", "cosine", "SQNR (dB)", "its block's own MSE", "own cosine", "own SQNR (dB)"]


def error_page(errors: LayerErrors, title: str, found: Sequence[str]) -> str:
    """The page.

    Args:
      errors: of the layers.
      title: what was compared.
      found: what is to be said first, a sentence each.

    Raises:
      ImportError: there is no matplotlib.
    """
    parts = [
        f"<p>{errors.tokens:,} tokens. SQNR is the signal-to-noise ratio of outputs in decibels: 6 dB more is an error "
        "half as large. Errors are those with all errors of the blocks before, and then with those of its own block "
        "alone.</p>",
        *(f"<p>{escape(line)}</p>" for line in found),
        "<h2>Block by block</h2>",
        image(error_figure(errors), "signal-to-noise ratios of outputs by block, for each kind of layer"),
        "<h2>Blocks</h2>",
        table(_HEAD, [_row(each) for each in errors.blocks]),
        "<h2>Every linear</h2><p>The last one is the head, whose outputs are the logits.</p>",
        table(_HEAD, [_row(each) for each in errors.linears]),
    ]
    return page(title, parts)


def _row(each: LayerError) -> list[str]:
    cells = [each.path]
    for deviation in (each.total, each.own):
        cells += [f"{deviation.mse:.2e}", f"{deviation.cosine:.5f}", decibels(deviation.sqnr)]
    return cells
