"""`any4 calibrate`: writes statistics of what enters each linear, for `any4 quantize --statistics`."""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from any4_jax import statistics
from any4_jax.cli.calibration import add_pieces, pieces_of
from any4_jax.cli.errors import CommandLineError, WorkError
from any4_jax.cli.methods import add_method, method_from
from any4_jax.cli.options import checked
from any4_jax.cli.output import megabytes, progress, tell
from any4_jax.cli.sources import MODEL_HELP, calibration_text, is_checkpoint, open_model
from any4_jax.methods.base import scope_of
from any4_jax.statistics import Gathered, Hessian, Moments
from any4_jax.walk import calibrate
from any4_jax.whole_file import check_target


def add(commands: Any, common: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Adds the command; `argv` is scanned for --method, whose fields become flags, before it is parsed."""
    parser = commands.add_parser(
        "calibrate",
        parents=[common],
        help="statistics of what enters each linear, to a file",
        description="Runs a text through a float model, and writes what enters each linear: the means of x, |x| and "
        "x^2 and the largest |x| of each feature, which serve most methods, and what --method needs beyond. any4 "
        "quantize --statistics takes them in place of a text.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", help="the file, in the safetensors format; an older one is replaced")
    parser.add_argument(
        "--text",
        metavar="prompt|essays|FILE",
        default="prompt",
        help="the text; prompt is the bundled one of 300 words (default), essays are 6,000 words",
    )
    add_pieces(parser)
    parser.add_argument(
        "--hessian",
        action="store_true",
        help="also the products of features, K x K numbers for each input, all that gptq --no-sequential needs",
    )
    add_method(parser, argv)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    method = checked(method_from(args), True)
    if scope_of(method) == "block":
        raise CommandLineError(
            f"got --method {args.method}, which runs whole blocks on a text as it quantizes, and statistics are no "
            "text; leave it out"
        )
    check_target(args.out)
    if is_checkpoint(args.model):
        raise WorkError(f"{args.model} is quantized already; give the float model that it was made from")
    text, begin = calibration_text(args.text), time.perf_counter()
    model = open_model(args.model)
    data, seqlen = pieces_of(args, model, text)
    with progress("calibrate", "block") as bar:
        also = (Hessian(),) if args.hessian else ()
        stats = calibrate(model, data, method, also=also, seqlen=seqlen, progress=bar)
    statistics.save(args.out, stats)
    seconds = time.perf_counter() - begin
    inputs = {id(gathered): gathered for gathered in stats.values()}.values()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(list(inputs)))
    print(
        f"{len(stats)} layers read {len(inputs)} inputs, of {_tokens(inputs):,} tokens each: {megabytes(size)} MB, "
        f"{seconds:.1f} s; wrote {args.out}"
    )
    tell(
        lambda: {
            "model": args.model,
            "statistics": args.out,
            "layers": len(stats),
            "inputs": len(inputs),
            "tokens": _tokens(inputs),
            "bytes": size,
            "seconds": seconds,
        }
    )
    print(f"next: any4 quantize {args.model} CKPT --statistics {args.out}", file=sys.stderr)
    return 0


def _tokens(inputs: Any) -> int:
    """The tokens that were read; experts share them."""

    def seen(gathered: Gathered) -> int:
        return int(np.max(np.asarray(gathered[Moments()].count)))

    return max(map(seen, inputs))
