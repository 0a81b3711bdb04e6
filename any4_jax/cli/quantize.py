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
from any4_jax.cli.caches import add_cache, cache_from
from any4_jax.cli.calibration import add_pieces, add_statistics, pieces_of, statistics_of
from any4_jax.cli.errors import CommandLineError, WorkError
from any4_jax.cli.interrupts import Interrupted, going_on
from any4_jax.cli.methods import add_method, method_from, short_name
from any4_jax.cli.options import checked
from any4_jax.cli.output import Progress, megabytes, progress, tell
from any4_jax.cli.search_results import add_search_results, given, results_of
from any4_jax.cli.sizes import expected, where_the_bits_go
from any4_jax.cli.sources import MODEL_HELP, add_inputs, calibration_text, check_output, is_checkpoint
from any4_jax.methods import CATALOGUE
from any4_jax.methods.spec import method_to_json
from any4_jax.surgery import quantize_inputs, quantized_leaves
from any4_jax.walk import calibrate_cache, quantize_model, save_search_results


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
        help="text that shows which inputs matter; prompt is the bundled one of 300 words (default), essays are 6,000 "
        "words, which gptq uses well",
    )
    add_pieces(parser)
    add_statistics(parser)
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
    add_cache(parser, unset="none, which is dense")
    add_method(parser, argv)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    source, cache = args.calibrate or "prompt", cache_from(args)
    stats = statistics_of(args)
    calibrated = source != "none" and stats is None
    learning = hasattr(cache, "calibrated")
    if learning and not calibrated:
        raise CommandLineError(
            f"got --cache {args.cache}, which learns from a text, and there is none; name one by --calibrate, or leave "
            "it out"
        )
    if not calibrated and (args.samples or args.seqlen):
        raise CommandLineError("got --samples or --seqlen with --calibrate none; name a text, or leave them out")
    found = results_of(args)
    stats = found if stats is None else stats
    method = checked(method_from(args, **given(args.method, found)), calibrated or stats is not None)
    check_output(args.out)
    if is_checkpoint(args.model):
        raise WorkError(f"{args.model} is quantized already; give the float model that it was made from")
    text = calibration_text(source) if calibrated and (found is None or learning) else None
    rules = [
        (pattern, None if name is None else method_from(args, name, **bits, **given(name, found)))
        for pattern, name, bits in args.rules
    ]

    begin = time.perf_counter()
    partial = partial_of(args.out)
    try:
        with PartialStore(partial, resume=args.resume) as finished:
            model = models.load(args.model)
            data, seqlen = pieces_of(args, model, text)
            if learning:
                with progress("calibrate the cache", "block") as bar:
                    cache = calibrate_cache(model, cache, data, seqlen=seqlen, progress=bar)
            print(expected(model, method, rules), file=sys.stderr)
            with progress("quantize", "linear") as bar:
                step = _telling(finished, bar)
                model = quantize_model(
                    model,
                    method,
                    data=data if stats is None else None,
                    stats=stats,
                    rules=rules,
                    seqlen=seqlen,
                    progress=step,
                    finished=finished,
                )
            if args.search_results is not None and found is None:
                save_search_results(model, args.search_results)
            if args.inputs is not None:
                model = quantize_inputs(model)
            checkpoint.save(args.out, model, cache=cache)
            finished.clear()
    except KeyboardInterrupt:
        raise Interrupted(going_on(args.out, partial, resume=args.resume)) from None
    leaves = quantized_leaves(model)
    stored = sum(leaf.nbytes for leaf in leaves.values())
    weights = sum(math.prod(leaf.shape) for leaf in leaves.values())
    seconds = time.perf_counter() - begin
    print(
        f"{len(leaves)} layers quantized: {8 * stored / weights:.3f} bits per weight, "
        f"{megabytes(stored)} MB, {seconds:.1f} s; wrote {args.out}"
    )
    print(where_the_bits_go(leaves.values()))
    tell(
        lambda: {
            "model": args.model,
            "checkpoint": args.out,
            "method": method_to_json(method),
            "layers": len(leaves),
            "weights": weights,
            "bytes": stored,
            "bits_per_weight": 8 * stored / weights if weights else None,
            "seconds": seconds,
        }
    )
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
    found = short_name(name) if separator else None
    if found is not None:
        return pattern, *found
    raise argparse.ArgumentTypeError(
        f"got {text!r}, need REGEX=METHOD with METHOD one of {', '.join(sorted(CATALOGUE))}, int2 to int8, none"
    )
