"""`any4 quantize`: reads a model, writes a checkpoint of 4-bit weights."""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from any4_jax import checkpoint, models
from any4_jax.checkpoint.partial import PartialStore
from any4_jax.cli.errors import CommandLineError, WorkError
from any4_jax.cli.interrupts import Interrupted, going_on
from any4_jax.cli.methods import add_method, method_from
from any4_jax.cli.numbers import count
from any4_jax.cli.options import checked
from any4_jax.cli.output import Progress, megabytes, progress
from any4_jax.cli.search_results import add_search_results, given, results_of
from any4_jax.cli.sizes import expected, where_the_bits_go
from any4_jax.cli.sources import MODEL_HELP, add_inputs, calibration_text, check_output, is_checkpoint
from any4_jax.data import pieces
from any4_jax.methods import CATALOGUE
from any4_jax.surgery import quantize_inputs, quantized_leaves
from any4_jax.walk import quantize_model, save_search_results

SEQLEN = 2048


def add(commands: Any, common: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Adds the command; `argv` is scanned for --method, whose fields become flags, before it is parsed."""
    parser = commands.add_parser(
        "quantize",
        parents=[common],
        help="quantize a model, write a checkpoint",
        epilog="Each method has fields of its own, which are flags: any4 quantize --method M --help shows those of M.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "out", metavar="OUT", help="folder of the checkpoint; an older one there is replaced at the end"
    )
    parser.add_argument(
        "--calibrate",
        metavar="prompt|essays|FILE|none",
        default="prompt",
        help="text that shows which inputs matter; prompt is the bundled one of 300 words (default), essays are 6,000 "
        "words, which gptq uses well",
    )
    parser.add_argument(
        "--samples",
        type=count,
        metavar="N",
        help="calibrate on N pieces of --seqlen tokens, spread evenly over the text (default: on all of it)",
    )
    parser.add_argument(
        "--seqlen",
        type=count,
        metavar="T",
        help=f"tokens in a piece of the text (default: {SEQLEN}, or the model's context if that is shorter)",
    )
    parser.add_argument(
        "--rules",
        action="append",
        type=_rule,
        default=[],
        metavar="REGEX=METHOD",
        help="linears whose path matches take METHOD, or stay as they are if it is none; "
        "may be repeated: the first match counts, and --method serves the other linears; "
        "METHOD takes the fields below that it has, unless it can't hold the value, and int8 is int with 8 bits; only "
        "a rule quantizes the embedding, which is the head of many models: embed_tokens=int8",
    )
    add_search_results(parser)
    parser.add_argument(
        "--no-resume",
        dest="resume",
        action="store_false",
        help="compute every linear from scratch; by default, results that an interrupted run with the same arguments "
        "left in OUT.partial are reused",
    )
    add_inputs(parser, "the checkpoint's")
    add_method(parser, argv)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    calibrated = args.calibrate != "none"
    if not calibrated and (args.samples or args.seqlen):
        raise CommandLineError("got --samples or --seqlen with --calibrate none; name a text, or leave them out")
    found = results_of(args)
    method = checked(method_from(args, **given(args.method, found)), calibrated or found is not None)
    check_output(args.out)
    if is_checkpoint(args.model):
        raise WorkError(f"{args.model} is quantized already; give the float model that it was made from")
    text = calibration_text(args.calibrate) if calibrated and found is None else None
    rules = [
        (pattern, None if name is None else method_from(args, name, **bits, **given(name, found)))
        for pattern, name, bits in args.rules
    ]

    begin = time.perf_counter()
    partial = partial_of(args.out)
    try:
        with PartialStore(partial, resume=args.resume) as finished:
            model = models.load(args.model)
            seqlen = min(args.seqlen or SEQLEN, model.config.max_position_embeddings)
            data: Any = text
            if text is not None and args.samples is not None:
                data = pieces(model.tokenizer.encode(text), args.samples, seqlen)
            print(expected(model, method, rules), file=sys.stderr)
            with progress("quantize", "linear") as bar:
                step = _telling(finished, bar)
                model = quantize_model(
                    model,
                    method,
                    data=data,
                    stats=found,
                    rules=rules,
                    seqlen=seqlen,
                    progress=step,
                    finished=finished,
                )
            if args.search_results is not None and found is None:
                save_search_results(model, args.search_results)
            if args.inputs is not None:
                model = quantize_inputs(model)
            checkpoint.save(args.out, model)
            finished.clear()
    except KeyboardInterrupt:
        raise Interrupted(going_on(args.out, partial, resume=args.resume)) from None
    leaves = quantized_leaves(model)
    stored = sum(leaf.nbytes for leaf in leaves.values())
    weights = sum(math.prod(leaf.shape) for leaf in leaves.values())
    print(
        f"{len(leaves)} layers quantized: {8 * stored / weights:.3f} bits per weight, "
        f"{megabytes(stored)} MB, {time.perf_counter() - begin:.1f} s; wrote {args.out}"
    )
    print(where_the_bits_go(leaves.values()))
    return 0


def partial_of(out: str) -> str:
    """The folder where a run with this output keeps what it has finished."""
    # abspath removes a trailing slash, which would put the folder inside OUT.
    return os.path.abspath(out) + ".partial"


def _telling(finished: PartialStore, bar: Progress) -> Callable[[int, int, str], None]:
    """A function that moves `bar`, and says once how many linears were finished before: all are looked up before the
    first step."""

    def step(done: int, total: int, path: str) -> None:
        if done == 1 and finished.reused:
            tqdm.write(f"resuming: {finished.reused} of {total} layers were done before", file=sys.stderr)
        bar(done, total, path)

    return step


def _rule(text: str) -> tuple[str, str | None, dict[str, int]]:
    """The pattern, the method's name or None, and the bits if the name gives them ("int8")."""
    pattern, separator, name = text.rpartition("=")
    if separator and name == "none":
        return pattern, None, {}
    if separator and name in CATALOGUE:
        return pattern, name, {}
    if separator and name[:-1] == "int" and name[-1] in "2345678":
        return pattern, "int", {"bits": int(name[-1])}
    raise argparse.ArgumentTypeError(
        f"got {text!r}, need REGEX=METHOD with METHOD one of {', '.join(sorted(CATALOGUE))}, int2 to int8, none"
    )
