"""Which method quantizes which linear, and the record of it."""

import dataclasses
import re
from collections.abc import Collection, Iterable, Sequence

from any4_jax.methods import AnyMethod
from any4_jax.methods.base import Note

Rules = Sequence[tuple[str, AnyMethod | None]]

DEFAULT_RULES: Rules = ((r"(.*[./])?(lm_head|embed_tokens)([./].*)?", None),)
"""Tried after the caller's rules: the head and the embedding stay as they are unless one of the caller's names them."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model was quantized: static, hashable, written to the manifest.

    Attributes:
      rules: (regex, method or None) of the last call of `quantize_model`, in the order in which they were tried.
      linears: (path, method, notes) of every quantized linear and embedding, in the order of paths; notes are
        (key, value) pairs.
    """

    rules: tuple[tuple[str, AnyMethod | None], ...]
    linears: tuple[tuple[str, AnyMethod, tuple[tuple[str, Note], ...]], ...]


def matching(paths: Iterable[str], pattern: str) -> list[str]:
    """The paths that a regex matches in full.

    Raises:
      ValueError: the regex doesn't compile, or matches no path.
    """
    paths = list(paths)
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"got rule {pattern!r}, which is not a regular expression ({error}); correct it") from None
    found = [path for path in paths if compiled.fullmatch(path)]
    if not found:
        raise ValueError(
            f"rule {pattern!r} matches none of the {len(paths)} linears (the first is "
            f"{paths[0] if paths else 'absent'!r}); a rule must match a whole path"
        )
    return found


def resolve(
    paths: Iterable[str], method: AnyMethod | None, rules: Rules | None, by_name: Collection[str] = ()
) -> dict[str, AnyMethod]:
    """The method for each path that is to be quantized.

    Rules are tried in order: the caller's, DEFAULT_RULES, then `method` for all other paths. The first rule whose
    regex matches the whole path decides; None leaves the linear as it is. Only a caller's rule can choose a path of
    `by_name`.

    Raises:
      ValueError: a rule of the caller matches no path, or its regex doesn't compile.
    """
    paths = list(paths)
    chosen: dict[str, AnyMethod | None] = {}
    for pattern, decided in rules or ():
        for path in matching(paths, pattern):
            chosen.setdefault(path, decided)
    for pattern, decided in (*DEFAULT_RULES, (r".*", method)):
        for path in filter(re.compile(pattern).fullmatch, paths):
            chosen.setdefault(path, None if path in by_name else decided)
    # In the order of the paths, not of the rules.
    return {path: taken for path in paths if (taken := chosen[path]) is not None}
