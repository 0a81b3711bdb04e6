"""`any4 diff`: where the errors of a quantized model start, and how they grow from layer to layer."""

import argparse
import csv
import io
from typing import Any

from any4_jax.cli.calibration import add_pieces, pieces_of
from any4_jax.cli.errors import CommandLineError, WorkError
from any4_jax.cli.output import progress, table, tell
from any4_jax.cli.sources import MODEL_HELP, add_inputs, calibration_text, given_text, open_model
from any4_jax.evaluation.drawing import check_matplotlib
from any4_jax.evaluation.error_page import error_page
from any4_jax.evaluation.error_plot import error_plot
from any4_jax.evaluation.layer_errors import Deviation, LayerErrors, layer_errors
from any4_jax.whole_file import check_target, write_whole

_COLUMNS = ["layer", "mse", "cosine", "sqnr_db", "own_mse", "own_cosine", "own_sqnr_db"]


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "diff",
        parents=[common],
        help="where errors start and grow, layer by layer",
        description="Runs two forms of a model side by side, and tells how far the outputs of each layer of B are from "
        "those of A: with all errors before it, and with those of its own block alone.",
        allow_abbrev=False,
    )
    parser.add_argument("a", metavar="A", help=f"the float model: a checkpoint, {MODEL_HELP}")
    parser.add_argument("b", metavar="B", help="another form of it, such as a checkpoint of it")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="what to run")
    source.add_argument(
        "--text",
        metavar="prompt|essays|FILE",
        default="prompt",
        help="or a text from a file; prompt is the bundled one of 300 words (default), essays are 6,000 words",
    )
    add_pieces(parser)
    parser.add_argument("--csv", metavar="FILE", help="write the errors of each layer here")
    parser.add_argument("--png", metavar="FILE", help="draw them here, block by block (needs matplotlib)")
    parser.add_argument("--html", metavar="FILE", help="write a report with the picture here (needs matplotlib)")
    add_inputs(parser, "run B while its")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for path in (args.csv, args.png, args.html):
        if path is not None:
            check_target(path)
    if args.png is not None or args.html is not None:
        check_matplotlib()
    if args.prompt == "":
        raise CommandLineError("the prompt is empty; pass at least one character")
    text = calibration_text(args.text) if args.prompt is None else given_text(args.prompt, "the prompt")
    reference, model = open_model(args.a), open_model(args.b, args.inputs)
    if reference.tokenizer is None:
        raise WorkError(f"{args.a} has no tokenizer, and a text is compared; add its tokenizer.json")
    data, seqlen = pieces_of(args, reference, text)
    with progress("diff", "block") as bar:
        errors = layer_errors(reference, model, data, seqlen=seqlen, progress=bar)
    title = f"{args.b} against {args.a}"
    print(_table(errors))
    for line in _words(errors):
        print(line)
    tell(lambda: _content(args, errors))
    if args.csv is not None:
        write_whole(args.csv, _csv(errors))
    if args.png is not None:
        error_plot(errors, args.png, title)
    if args.html is not None:
        write_whole(args.html, error_page(errors, title, [line for line in _words(errors) if line]))
    return 0


def _table(errors: LayerErrors) -> str:
    header = ["layer", "MSE", "cosine", "SQNR dB", "its block's own"]
    rows = []
    for each in [*errors.linears, *errors.blocks]:
        total, own = each.total, each.own
        # A tied head goes by the name of the embedding.
        path = f"{each.path} (logits)" if each is errors.linears[-1] else each.path
        rows.append([path, f"{total.mse:.2e}", f"{total.cosine:.5f}", _decibels(total), _decibels(own)])
    return table(header, rows)


def _words(errors: LayerErrors) -> list[str]:
    """What the table shows, in a few lines."""
    lines = [""]
    if errors.first is None:
        lines.append("no layer's output differs")
    else:
        first, last, worst = errors.blocks[0], errors.blocks[-1], errors.worst
        lines += [
            f"errors start in {errors.first}; {worst.path} adds most, {_decibels(worst.own)} dB by itself",
            f"the sum that blocks hand on has {_decibels(first.total)} dB after {first.path}, "
            f"{_decibels(last.total)} dB after {last.path}",
        ]
    lines.append(
        f"logits: KL {errors.kl:.5f} nats per token, {errors.top1:.2%} of the likeliest tokens agree "
        f"({errors.tokens:,} tokens)"
    )
    return lines


def _decibels(deviation: Deviation) -> str:
    return f"{deviation.sqnr:.2f}" if deviation.noise else "equal"


def _rows(errors: LayerErrors) -> list[dict[str, Any]]:
    rows = []
    for each in [*errors.linears, *errors.blocks]:
        values = [x for deviation in (each.total, each.own) for x in (deviation.mse, deviation.cosine, deviation.sqnr)]
        rows.append(dict(zip(_COLUMNS, [each.path, *values], strict=True)))
    return rows


def _content(args: argparse.Namespace, errors: LayerErrors) -> dict[str, Any]:
    rows = _rows(errors)
    return {
        "a": args.a,
        "b": args.b,
        "tokens": errors.tokens,
        "kl_nats_per_token": errors.kl,
        "top1_agreement": errors.top1,
        "errors_start_in": errors.first,
        "embedding_sqnr_db": errors.embedding.sqnr,
        "linears": rows[: len(errors.linears)],
        "blocks": rows[len(errors.linears) :],
    }


def _csv(errors: LayerErrors) -> str:
    file = io.StringIO()
    rows = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
    rows.writeheader()
    rows.writerows(_rows(errors))
    return file.getvalue()
