"""What a command may raise, and the exit code and sentence that come of it."""


class CommandLineError(Exception):
    """The command line asks for something that cannot be: exit code 2."""


class WorkError(Exception):
    """The work cannot be done, for a reason told in one sentence: exit code 1."""


def sentence(error: BaseException) -> str:
    """The one line shown for an error that a command did not handle itself."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (CommandLineError, WorkError, ValueError, TypeError, OSError, RuntimeError)) and text:
        return text
    # A KeyError's text alone ("'x'") is no sentence.
    return f"{type(error).__name__}: {text}; run again with --debug for the traceback"
