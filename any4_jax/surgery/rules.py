"""Which method quantizes which linear, and the record of it."""

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from any4_jax.methods import AnyMethod
from any4_jax.methods.base import Note
from any4_jax.methods.matrices import Matrix
from any4_jax.surgery.declarations import Axes, Declaration, Declared, Einsum

_NAMED = 3
_NONE: Mapping[str, object] = {}

Rule = tuple[str, AnyMethod | None] | tuple[str, AnyMethod | None, Declaration]
Rules = Sequence[Rule]

DEFAULT_RULES: Sequence[tuple[str, AnyMethod | None]] = ((r"(.*[./])?(lm_head|embed_tokens|router)([./].*)?", None),)
"""Tried after the caller's rules: the head, the embedding and the routers of experts stay as they are unless one of the
caller's names them."""


@dataclasses.dataclass(frozen=True)
class Training:
    """How what is quantized was trained on the float model's outputs, and on what text.

    Attributes:
      by: the method that trained blocks, or "end to end".
      settings: (key, value) pairs, of what was asked for and what was reached.
      tokens: how many tokens of text there were.
      passages: the `any4_jax.data.passages.sketch` of these.
    """

    by: str
    settings: tuple[tuple[str, Note], ...]
    tokens: int
    passages: str


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model was quantized: static, hashable, written to the manifest.

    Attributes:
      rules: (regex, method or None) of the last call of `quantize_model`, in the order in which they were tried.
      linears: (path, method, notes) of every quantized linear and embedding, in the order of paths; notes are
        (key, value) pairs.
      training: what trained it, first to last.
    """

    rules: tuple[tuple[str, AnyMethod | None], ...]
    linears: tuple[tuple[str, AnyMethod, tuple[tuple[str, Note], ...]], ...]
    training: tuple[Training, ...] = ()

    def __repr__(self) -> str:
        """How many linears each method quantized; the fields themselves are as long as the model has linears."""
        counts = Counter(method.name for _, method, _ in self.linears)
        trained = [f"trained: {each.by}" for each in self.training]
        return f"Recipe({', '.join([*(f'{count} linears: {name}' for name, count in counts.items()), *trained])})"


def matching(paths: Iterable[str], pattern: str, quantized: Collection[str] = ()) -> list[str]:
    """The paths that a regex matches in full.

    Args:
      paths: of the linears that can be chosen.
      pattern: the regex.
      quantized: the paths of linears that can't be chosen, because they are quantized already.

    Raises:
      TypeError: the pattern is no text.
      ValueError: the regex doesn't compile, or matches no path.
    """
    paths, compiled = list(paths), _compiled(pattern)
    found = [path for path in paths if compiled.fullmatch(path)]
    already = [path for path in quantized if compiled.fullmatch(path)]
    if already and not found:
        raise ValueError(
            f"rule {pattern!r} matches only linears that are quantized already (the first is {already[0]!r}); quantize "
            "the float model"
        )
    if not found:
        raise ValueError(
            f"rule {pattern!r} matches none of the {len(paths)} linears (the first is "
            f"{paths[0] if paths else 'absent'!r}); a rule must match a whole path"
        )
    return found


def _compiled(pattern: str) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise TypeError(f"got {pattern!r} as a regular expression of paths, need a str; pass one")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"got rule {pattern!r}, which is not a regular expression ({error}); correct it") from None


def resolve(
    paths: Iterable[str],
    method: AnyMethod | None,
    rules: Rules | None,
    by_name: Collection[str] = (),
    quantized: Collection[str] = (),
    others: Mapping[str, object] = _NONE,
) -> dict[str, AnyMethod]:
    """The method for each path that is to be quantized.

    Rules are tried in order: the caller's, DEFAULT_RULES, then `method` for all other paths. The first rule whose
    regex matches the whole path decides; None leaves the linear as it is. Only a caller's rule can choose a path of
    `by_name`. `quantized` are the paths of linears that are quantized already, for messages. `others`
    are the arrays that nothing is known of, by path, with their descriptions: a rule may leave them as they are.

    Raises:
      TypeError: the rules are no pairs of a regex and a method or None.
      ValueError: a rule of the caller matches no path, or its regex doesn't compile.
    """
    paths = list(paths)
    chosen: dict[str, AnyMethod | None] = {}
    for pattern, decided in _pairs(rules):
        compiled = _compiled(pattern)
        unknown = {path: other for path, other in others.items() if compiled.fullmatch(path)}
        if unknown and not any(map(compiled.fullmatch, paths)):
            if decided is None:
                continue
            path, other = next(iter(unknown.items()))
            raise ValueError(
                f"rule {pattern!r} matches {path} ({other}), of which nothing tells what is contracted; pass example "
                f"inputs=, or declare it: ({pattern!r}, method, any4_jax.Einsum('BTD,DNH->BTNH'))"
            )
        for path in matching(paths, pattern, quantized):
            chosen.setdefault(path, decided)
    for pattern, decided in (*DEFAULT_RULES, (r".*", method)):
        for path in filter(re.compile(pattern).fullmatch, paths):
            chosen.setdefault(path, None if path in by_name else decided)
    # In the order of the paths, not of the rules.
    return {path: taken for path in paths if (taken := chosen[path]) is not None}


def declarations(rules: Rules | None) -> Declared:
    """What the rules declare of kernels: (regex, declaration) of those with three parts.

    Raises:
      TypeError: as `resolve`.
    """
    _pairs(rules)
    whole: Any = rules or ()
    return tuple((rule[0], rule[2]) for rule in whole if len(rule) > 2)


def declared_for(names: Iterable[str], declared: Declared) -> dict[str, Declaration]:
    """The first declaration whose regex matches each name.

    Raises:
      TypeError, ValueError: as `matching`.
    """
    names, found = list(names), dict[str, Declaration]()
    for pattern, declaration in declared:
        for name in matching(names, pattern):
            found.setdefault(name, declaration)
    return found


def pairs(rules: Rules | None) -> tuple[tuple[str, AnyMethod | None], ...]:
    """The regex and the method of each rule."""
    return tuple((rule[0], rule[1]) for rule in rules or ())


def _pairs(rules: Rules | None) -> Sequence[tuple[str, AnyMethod | None]]:
    """The caller's rules, each as a pair of a regex and a method or None."""
    need = "need pairs of a regex and a method or None, such as [(r'.*mlp.*', None)]"
    if rules is None:
        return ()
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        raise TypeError(f"got rules of type {type(rules).__name__}, {need}; pass a list of them")
    given: Any = rules
    for rule in given:
        parts = len(rule) if isinstance(rule, tuple | list) else 0
        if parts != 2 and not (parts == 3 and isinstance(rule[2], Einsum | Axes)):
            raise TypeError(f"got the rule {rule!r}, {need}; write it so")
        if rule[1] is not None and not callable(getattr(rule[1], "apply", None)):
            raise TypeError(f"got the rule {rule!r}, whose second part is no method, {need}; write it so")
    return pairs(rules)


def refuse_special(matrices: Mapping[str, Matrix], chosen: Iterable[str]) -> None:
    """Refuses to quantize layers that compute something else than a quantized layer would.

    Args:
      matrices: by path.
      chosen: the paths that are to be quantized.

    Raises:
      ValueError: one of `chosen` can't be quantized.
    """
    found = {path: special for path in chosen if (special := matrices[path].special) is not None}
    if found:
        named = ", ".join(f"{path} ({special})" for path, special in list(found.items())[:_NAMED])
        rest = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise ValueError(
            f"got layers that a quantized one can't take the place of: {named}{rest}; leave each as it is with a rule "
            f"such as ({re.escape(next(iter(found)))!r}, None), or make it a plain layer of flax"
        )
