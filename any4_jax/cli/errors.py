"""The errors that a command may raise, with their exit codes and messages."""

from any4_jax.one_line import one_line


class CommandLineError(Exception):
    """The command line is wrong: exit code 2."""


class WorkError(Exception):
    """The work can't be done, for a reason that the message gives in one sentence: exit code 1."""


def sentence(error: BaseException) -> str:
    """The one line that is shown for an error."""
    text = one_line(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        return one_line(f"{error.filename}: {error.strerror}")
    if isinstance(error, (CommandLineError, WorkError, ValueError, TypeError, OSError, RuntimeError)) and text:
        return text
    # The text of a KeyError alone ("'x'") is not a sentence.
    return f"{type(error).__name__}: {text}; run again with --debug for the traceback"
