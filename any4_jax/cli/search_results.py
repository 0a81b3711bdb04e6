"""`--search-results FILE`: what fpq has searched is kept in a file, which a later run takes in place of a search."""

import argparse
import os
from typing import Any

from any4_jax.benchmarks.files import check_target
from any4_jax.cli.errors import CommandLineError
from any4_jax.methods import FPQ
from any4_jax.walk import load_search_results


def add_search_results(parser: argparse.ArgumentParser) -> None:
    """Adds --search-results."""
    parser.add_argument(
        "--search-results",
        metavar="FILE",
        help="with the method fpq: write the formats, biases and shifts that it found to FILE; or, if FILE is there, "
        "take them from it, without a search and a text",
    )


def results_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """What the file of --search-results holds, by path; None if it is to be written, or the flag is not given.

    Raises:
      CommandLineError: no fpq is named, whose search it could be.
      OSError, ValueError: it can't be read or written.
    """
    if args.search_results is None:
        return None
    if FPQ.name not in (args.method, *(name for _, name, _ in args.rules)):
        raise CommandLineError(
            f"got --search-results with --method {args.method}, and only the method {FPQ.name} writes and reads such a "
            "file; leave it out"
        )
    if os.path.exists(args.search_results):
        return dict(load_search_results(args.search_results))
    check_target(args.search_results)
    return None


def given(name: str, results: dict[str, Any] | None) -> dict[str, Any]:
    """The fields of the method `name` that make it take results, if there are any."""
    return {"given": True} if results is not None and name == FPQ.name else {}
