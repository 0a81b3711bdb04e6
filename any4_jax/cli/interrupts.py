"""Ctrl-C in the process of the command: one line and exit code 130, whenever it comes.

An interrupt is a KeyboardInterrupt, so that what is half done is undone on its way out. Three things stand against
that: callbacks that swallow it, what other threads still compile while the interpreter is torn down, and the seconds in
which the libraries are imported. Because of these, the package imports this module first.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

INTERRUPTED = 130
AGAIN = "nothing was kept, so running it again begins anew"
# Long enough for a callback to return, too short to be noticed.
_SWALLOWED_AFTER = 0.05


class Interrupted(KeyboardInterrupt):
    """An interrupt with words on what running the command again does."""


class _State:
    """What has come so far, in the process of the command."""

    came = False


def going_on(out: str, partial: str, *, resume: bool) -> str:
    """What running a command again does after an interrupt.

    Args:
      out: its output.
      partial: the folder where it keeps what it has finished.
      resume: whether it was run without --no-resume.
    """
    if not os.path.isdir(partial):
        return AGAIN
    without = "" if resume else "without --no-resume "
    return f"run it again {without}to continue with what {out.rstrip('/')}.partial keeps"


def line(interrupt: BaseException) -> str:
    """The line that is shown for an interrupt."""
    return f"any4: interrupted; {str(interrupt) or AGAIN}"


def check() -> None:
    """Raises KeyboardInterrupt if one came and was swallowed. Called at each step of the work."""
    if _State.came:
        raise KeyboardInterrupt


def came() -> bool:
    """Whether an interrupt came: an error that follows one is a callback's word for it."""
    return _State.came


def while_importing() -> None:
    """Lets Ctrl-C end the process of the command quietly while the libraries are imported; of any other process, and of
    one that ignores Ctrl-C, nothing is changed."""
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: _leave(line(KeyboardInterrupt())))


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """In the body, an interrupt is raised once, and again if it was swallowed; a second one ends the process at once.
    What the body exits with is the process's exit, which waits for no thread if an interrupt came."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as under nohup
        yield
        return
    signal.signal(signal.SIGINT, _raise_once)
    sys.unraisablehook = _raise_again
    try:
        yield
    except KeyboardInterrupt as interrupt:
        _leave(line(interrupt))
    # Nothing is left to interrupt, and the interpreter's own end is no place for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _State.came:
        _leave(None)


def _raise_once(signum: int, frame: FrameType | None) -> None:
    if _State.came:
        _leave(line(Interrupted("left at once, as it was the second time; what was saved before is whole")))
    _State.came = True
    raise KeyboardInterrupt


def _raise_again(swallowed: Any) -> None:
    """The hook for exceptions that nobody can catch, as those in callbacks of C code and of the garbage collector."""
    if not issubclass(swallowed.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(swallowed)
        return

    def again() -> None:
        _State.came = False
        os.kill(os.getpid(), signal.SIGINT)

    threading.Timer(_SWALLOWED_AFTER, again).start()


def _leave(last: str | None) -> None:
    """Ends the process without the interpreter's end, which threads that still compile would crash."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        if last is not None:
            print(last, file=sys.stderr)
        sys.stderr.flush()
    os._exit(INTERRUPTED)


def _is_command() -> bool:
    """Whether this process was started as `any4` or as `python -m any4_jax`."""
    if sys.argv[:1] == ["-m"]:  # until the package is imported
        options = sys.orig_argv
        return "-m" in options and options[options.index("-m") + 1 :][:1] == ["any4_jax"]
    return bool(sys.argv) and Path(sys.argv[0]).stem == "any4"


while_importing()
