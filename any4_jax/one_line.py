"""What others wrote, as a part of a one-line message: names in files, arguments, the errors of other libraries."""

LONGEST = 300
"""Characters of the longest word that is shown whole; a name in a path has at most 255."""
_SHOWN = 60


def one_line(text: object, longest: int = LONGEST) -> str:
    """A text on one line: what can't be printed is escaped, and a longer word is cut."""
    words = ("".join(c if c.isprintable() else repr(c)[1:-1] for c in word) for word in str(text).split())
    return " ".join(word if len(word) <= longest else f"{word[:longest]}..." for word in words)


def shown(value: object) -> str:
    """A value from a file, short and on one line; a plain name has no quotes."""
    if isinstance(value, str) and value.isprintable() and value and len(value) <= _SHOWN:
        return value
    start = repr(value[: _SHOWN + 1] if isinstance(value, str | bytes | list) else value)
    return start if len(start) <= _SHOWN else f"{start[:_SHOWN]}..."
