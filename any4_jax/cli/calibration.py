"""What models are calibrated on: pieces of a text, or a file of statistics that `any4 calibrate` wrote."""

import argparse
from typing import Any

from any4_jax import statistics
from any4_jax.cli.errors import CommandLineError
from any4_jax.cli.numbers import count
from any4_jax.data import pieces
from any4_jax.models import Decoder

SEQLEN = 2048


def add_pieces(parser: argparse.ArgumentParser) -> None:
    """Adds --samples and --seqlen."""
    parser.add_argument(
        "--samples",
        type=count,
        metavar="N",
        help="read N pieces of --seqlen tokens, spread evenly over the text (default: all of it)",
    )
    parser.add_argument(
        "--seqlen",
        type=count,
        metavar="T",
        help=f"tokens in a piece of the text (default: {SEQLEN}, or the model's context if that is shorter)",
    )


def add_statistics(parser: argparse.ArgumentParser) -> None:
    """Adds --statistics."""
    parser.add_argument(
        "--statistics", metavar="FILE", help="take the statistics of this file of any4 calibrate, in place of a text"
    )


def pieces_of(args: argparse.Namespace, model: Decoder, text: str | None) -> tuple[Any, int]:
    """What to calibrate on, as --samples and --seqlen say, and the longest piece in tokens."""
    seqlen = min(args.seqlen or SEQLEN, model.config.max_position_embeddings)
    if text is None or args.samples is None:
        return text, seqlen
    return pieces(model.tokenizer.encode(text), args.samples, seqlen), seqlen


def statistics_of(args: argparse.Namespace) -> dict[str, statistics.Gathered] | None:
    """What the file of --statistics holds, by path; None where the flag is not given.

    Raises:
      CommandLineError: there are flags that say what else to calibrate on.
      OSError, ValueError: it can't be read.
    """
    if args.statistics is None:
        return None
    beside = {"calibrate": args.calibrate, "samples": args.samples, "seqlen": args.seqlen}
    beside |= {"search-results": args.search_results}
    for flag, value in beside.items():
        if value is not None:
            raise CommandLineError(f"got --statistics and --{flag}, and they say the same twice; leave one of them out")
    return statistics.load(args.statistics)
