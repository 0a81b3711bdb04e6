"""`any4 analyze`: what methods do to each layer of a float model, side by side."""

import argparse
import csv
import io
from collections.abc import Sequence
from typing import Any

from any4_jax.cli.calibration import add_pieces, pieces_of
from any4_jax.cli.errors import CommandLineError, WorkError
from any4_jax.cli.methods import add_method, method_from, named_method
from any4_jax.cli.output import progress, table, tell
from any4_jax.cli.sources import MODEL_HELP, calibration_text, is_checkpoint, open_model
from any4_jax.evaluation.analysis import Analysis, LayerAnalysis, analyze
from any4_jax.evaluation.analysis_plots import heat_maps, row_plot
from any4_jax.evaluation.analysis_report import html
from any4_jax.evaluation.analysis_summary import summary
from any4_jax.evaluation.drawing import check_matplotlib, write_png
from any4_jax.methods.base import scope_of
from any4_jax.whole_file import check_target, write_whole

_BUNDLED = {"prompt": "the bundled prompt", "essays": "the bundled essays"}


def add(commands: Any, common: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Adds the command; `argv` is scanned for --method, whose fields become flags, before it is parsed."""
    parser = commands.add_parser(
        "analyze",
        parents=[common],
        help="what methods do to each layer, side by side",
        description="Quantizes each layer of a float model by --method and by those beside it, and tells what the "
        "weights are like and what is lost: in the weights, and in the outputs for inputs that are uniform, normal, or "
        "those of a text.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--beside",
        nargs="*",
        type=named_method,
        default=[named_method("int"), named_method("nf4")],
        metavar="METHOD",
        help="methods to compare with, which take the fields below that they have; int8 is int with 8 bits (default: "
        "int nf4)",
    )
    parser.add_argument("--layers", metavar="REGEX", default=".*", help="only layers whose path matches")
    parser.add_argument(
        "--text",
        metavar="prompt|essays|FILE|none",
        default="prompt",
        help="the text whose inputs count; prompt is the bundled one of 300 words (default), essays are 6,000 words",
    )
    add_pieces(parser)
    parser.add_argument(
        "--row",
        type=_row,
        metavar="[LAYER:]N",
        default=(None, 0),
        help="the row whose weights and levels are drawn (default: row 0 of the first layer)",
    )
    parser.add_argument("--csv", metavar="FILE", help="write all numbers here, a line for each layer and method")
    parser.add_argument("--png", metavar="FILE", help="draw heat maps of the layers here (needs matplotlib)")
    parser.add_argument("--row-png", metavar="FILE", help="draw the row and its levels here (needs matplotlib)")
    parser.add_argument("--html", metavar="FILE", help="write a report with pictures here (needs matplotlib)")
    add_method(parser, argv)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    drawn = (args.png, args.row_png, args.html)
    for path in (args.csv, *drawn):
        if path is not None:
            check_target(path)
    if any(drawn):
        check_matplotlib()
    methods = _methods(args)
    if is_checkpoint(args.model):
        raise WorkError(f"{args.model} is quantized already; give the float model that it was made from")
    text = None if args.text == "none" else calibration_text(args.text)
    if text is None and (args.samples or args.seqlen):
        raise CommandLineError("got --samples or --seqlen with --text none; name a text, or leave them out")
    model = open_model(args.model)
    data, seqlen = pieces_of(args, model, text)
    row = args.row if args.row_png or args.html else None
    with progress("analyze", "layer") as bar:
        analysis = analyze(model, methods, data, layers=args.layers, row=row, seqlen=seqlen, progress=bar)
    layers = analysis.layers
    print(_table(layers))
    inputs = "normal inputs" if text is None else f"the inputs that {_BUNDLED.get(args.text, args.text)} gives"
    print(f"\nW, out: signal-to-noise ratios (SQNR) of the weights, and of the outputs for {inputs}")
    for label, found in summary(layers).items():
        print(
            f"{label}: {found['bits_per_weight']:.3f} bits per weight; SQNR of weights {found['weights_sqnr_db']:.2f} "
            f"dB, of outputs {found['output_sqnr_db']:.2f} dB; nearest in {found['nearest_in_layers']:.0f} of "
            f"{len(layers)} layers"
        )
    tell(lambda: {"model": args.model, "text": args.text, "methods": summary(layers), "layers": _rows(layers)})
    if args.csv is not None:
        write_whole(args.csv, _csv(layers))
    if args.png is not None:
        write_png(heat_maps(layers), args.png)
    _draw_row(args, analysis)
    if args.html is not None:
        title = f"{args.model}: {', '.join(methods)}"
        write_whole(args.html, html(analysis, title, None if text is None else _BUNDLED.get(args.text, args.text)))
    return 0


def _draw_row(args: argparse.Namespace, analysis: Analysis) -> None:
    if args.row_png is not None and analysis.row is not None:
        write_png(row_plot(analysis.row), args.row_png)


def _methods(args: argparse.Namespace) -> dict[str, Any]:
    """The methods by label, --method the last of them."""
    made = {label: method_from(args, name, **bits) for label, name, bits in args.beside}
    made.pop(args.method, None)
    made[args.method] = method_from(args)
    for label, method in made.items():
        if scope_of(method) != "matrix":
            raise CommandLineError(
                f"got the method {label}, which quantizes the matrices of a {scope_of(method)} together, and one of "
                "single matrices is needed; compare the models with any4 diff"
            )
    return made


def _row(text: str) -> tuple[str | None, int]:
    path, _, number = text.rpartition(":")
    if not number.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, need the number of a row, or LAYER:N")
    return path or None, int(number)


def _table(layers: Sequence[LayerAnalysis]) -> str:
    header = ["layer", "std", "kurtosis", "entropy"]
    header += [f"{label} {what}" for label in layers[0].methods for what in ("W dB", "out dB")]
    rows = []
    for each in layers:
        cells = [each.path, f"{each.weights.std:.4f}", f"{each.weights.kurtosis:.2f}", f"{each.weights.entropy:.2f}"]
        for loss in each.methods.values():
            cells += [f"{loss.weights.sqnr:.2f}", f"{loss.output.sqnr:.2f}"]
        rows.append(cells)
    return table(header, rows)


def _rows(layers: Sequence[LayerAnalysis]) -> list[dict[str, Any]]:
    rows = []
    for each in layers:
        w = each.weights
        of_weights = {"mean": w.mean, "std": w.std, "min": w.low, "max": w.high, "kurtosis": w.kurtosis}
        of_weights |= {"entropy_bits": w.entropy}
        for label, loss in each.methods.items():
            row = {"layer": each.path, "shape": "x".join(map(str, w.shape)), **of_weights, "method": label}
            row |= {"bits_per_weight": loss.bits_per_weight, "code_entropy_bits": loss.code_entropy}
            kinds = ("weights", "uniform", "normal", "calibrated")
            for kind in kinds:
                lost = getattr(loss, kind)
                row |= {f"{kind}_mse": None if lost is None else lost.mse}
                row |= {f"{kind}_sqnr_db": None if lost is None else lost.sqnr}
            rows.append(row)
    return rows


def _csv(layers: Sequence[LayerAnalysis]) -> str:
    file, rows = io.StringIO(), _rows(layers)
    table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return file.getvalue()
