"""The command `any4`: one thin file per command, each around one public function."""

import sys
from collections.abc import Sequence

from any4_jax.cli import interrupts

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 the work failed, 2 the command line is wrong, 130 interrupted.

    Without `argv` it is the process's own command, and the process is its to set up: Ctrl-C is dealt with by
    `interrupts`, and compiled programs are kept in the user's cache folder.
    """
    if argv is not None:
        from any4_jax.cli.commands import run

        return run(argv)
    with interrupts.handled():
        from any4_jax.cli import compiled
        from any4_jax.cli.commands import run

        compiled.keep()
        return run(sys.argv[1:])
