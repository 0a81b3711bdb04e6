"""Shared by the benchmark commands: options, checks before the work, and the end of the output."""

import argparse
import os
from collections.abc import Callable

from any4_jax.benchmarks import files, machine, schema
from any4_jax.choice import PLATFORMS
from any4_jax.cli.errors import CommandLineError
from any4_jax.cli.numbers import count
from any4_jax.cli.output import tell


def add_common(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument(
        "--rounds", type=count, default=rounds, metavar="N", help=f"turns of each candidate (default: {rounds})"
    )
    add_machine(parser)


def add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--platform", choices=PLATFORMS, help="refuse to run on any other (default: what jax runs on)")
    parser.add_argument("--out", metavar="FILE", help="write the results here as JSON")


def counts(text: str) -> tuple[int, ...]:
    """The type of a flag whose value is whole numbers of at least 1, with commas between them."""
    return tuple(dict.fromkeys(count(part) for part in text.split(",")))


def check(args: argparse.Namespace, drawing: str | None = None) -> None:
    """Refuses, before the work, arguments that would fail after it, among them a file for a drawing."""
    for file in (args.out, drawing):
        if file is not None:
            files.check_target(file)
    if args.out is not None and drawing is not None and os.path.realpath(args.out) == os.path.realpath(drawing):
        raise CommandLineError(f"got {args.out} for the results and for the drawing; give each a file of its own")
    here = machine.platform()
    if args.platform not in (None, here):
        raise CommandLineError(
            f"got --platform {args.platform}, and jax runs on {here} here; set JAX_PLATFORMS={args.platform} "
            "where jax has it, or leave --platform out"
        )


def heading(result: schema.Result) -> str:
    device, stream = result.device, result.settings
    return (
        f"{device.name}, {device.platform}, {device.cores} cores; reads {stream['stream_gb_per_s']:.2f} GB/s "
        f"({stream['stream_way']})"
    )


def finish(
    args: argparse.Namespace,
    result: schema.Result,
    drawing: str | None = None,
    draw: Callable[[], str] = lambda: "",
) -> int:
    """Prints the notes, and writes the results and then the drawing to the files that were given for them."""
    tell(lambda: schema.as_json(result))
    for note in result.notes:
        print(f"note: {note}")
    if args.out is not None:
        schema.write(args.out, result)
        print(f"wrote {args.out}")
    if drawing is not None:
        files.write_whole(drawing, draw())
        print(f"wrote {drawing}")
    return 0
