"""Parses a command line, runs its command, and turns whatever goes wrong into one line and an exit code."""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from any4_jax import __version__
from any4_jax.cli import (
    analyze,
    bench,
    calibrate,
    chat,
    completion,
    demo,
    diff,
    evaluate,
    explain,
    generate,
    inspect,
    needle,
    quantize,
    reproduce,
    tables,
    tune,
)
from any4_jax.cli.errors import CommandLineError, sentence
from any4_jax.cli.interrupts import INTERRUPTED, came, check, line
from any4_jax.cli.output import only_json
from any4_jax.one_line import one_line

DONE, FAILED, WRONG = 0, 1, 2


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage that argparse prints first."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, f"any4: error: {one_line(message)}; see {self.prog} --help\n")


def run(argv: Sequence[str]) -> int:
    """Runs one command; see `any4_jax.cli.main`."""
    debug = "--debug" in argv
    try:
        import_named(argv)
        args = parser_of(argv).parse_args(argv)
        debug = getattr(args, "debug", False)
        with only_json(getattr(args, "json", False)):
            code = args.run(args)
        check()
        return code
    except SystemExit as stop:  # how argparse ends, also after --help
        return DONE if stop.code is None else int(stop.code)
    except KeyboardInterrupt as interrupt:
        print(line(interrupt), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of the output is gone (any4 ... | head). The interpreter flushes stdout again at exit, and that
        # must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if came():
            print(line(KeyboardInterrupt()), file=sys.stderr)
            return INTERRUPTED
        if debug:
            traceback.print_exc()
        print(f"any4: error: {sentence(error)}", file=sys.stderr)
        return WRONG if isinstance(error, CommandLineError) else FAILED


def import_named(argv: Sequence[str]) -> None:
    """Imports the modules that the command line names with --import, before it is parsed: their methods have flags.

    Raises:
      CommandLineError: there is no such module.
    """
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scan.add_argument("--import", dest="modules", action="append", default=[])
    try:
        names = scan.parse_known_args(argv)[0].modules
    except argparse.ArgumentError:  # the flag without a value: the full parser says so
        return
    for name in names:
        try:
            importlib.import_module(name)
        except (ModuleNotFoundError, TypeError, ValueError) as error:
            if isinstance(error, ModuleNotFoundError) and not f"{name}.".startswith(f"{error.name}."):
                raise  # the module is there, and misses another
            raise CommandLineError(
                f"got --import {name}, and Python finds no module of that name; install it, or add its folder to "
                "PYTHONPATH"
            ) from error


def parser_of(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for a command line, which is scanned for the method that it names."""
    # These may come before the command or after it; without SUPPRESS the second parser would reset the first's value.
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    common.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print the results as a JSON object, and nothing else, to stdout",
    )
    common.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=argparse.SUPPRESS,
        metavar="MODULE",
        help="import this Python module first, so that the methods, operators and families that it registers are "
        "there; may be repeated; its code runs, so name only what you trust",
    )
    parser = _Parser(
        prog="any4", parents=[common], description="Learned 4-bit weights for JAX models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"any4 {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo.add(commands, common)
    calibrate.add(commands, common, argv)
    quantize.add(commands, common, argv)
    tune.add(commands, common)
    generate.add(commands, common)
    chat.add(commands, common)
    evaluate.add(commands, common, argv)
    needle.add(commands, common)
    analyze.add(commands, common, argv)
    diff.add(commands, common)
    inspect.add(commands, common)
    explain.add(commands, common)
    tables.add(commands, common)
    reproduce.add(commands, common, argv)
    bench.add(commands, common, argv)
    completion.add(commands, common)
    return parser
