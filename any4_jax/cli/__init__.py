"""The command `any4`: one thin file per command, each around one public function."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from any4_jax.cli import bench, demo, evaluate, explain, generate, inspect, quantize
from any4_jax.cli.errors import CommandLineError, sentence

__all__ = ["main"]

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage that argparse prints first."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, f"any4: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 the work failed, 2 the command line is wrong."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = _parser(argv).parse_args(argv)
    except SystemExit as stop:  # how argparse ends, also after --help
        return DONE if stop.code is None else int(stop.code)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("any4: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of the output is gone (any4 ... | head). The interpreter flushes stdout again at exit, and that
        # must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if getattr(args, "debug", False):
            traceback.print_exc()
        print(f"any4: error: {sentence(error)}", file=sys.stderr)
        return WRONG if isinstance(error, CommandLineError) else FAILED


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    # --debug may come before the command or after it; without SUPPRESS the second parser would reset the first's value.
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser = _Parser(
        prog="any4", parents=[common], description="Learned 4-bit weights for JAX models.", allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo.add(commands, common)
    quantize.add(commands, common, argv)
    generate.add(commands, common)
    evaluate.add(commands, common)
    inspect.add(commands, common)
    explain.add(commands, common)
    bench.add(commands, common, argv)
    return parser
