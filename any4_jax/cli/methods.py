"""`--method NAME` and the flags of its fields. The flags of an inner method start with the name of the field that
holds it: `--method gptq --inner any4 --inner-bits 3`."""

import argparse
import dataclasses
import typing
from collections.abc import Collection, Sequence
from typing import Any

from any4_jax.cli.options import add_fields, build, only_held
from any4_jax.methods import CATALOGUE, AnyMethod

DEFAULT = "any4"
_NONE = "none"


def add_method(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Adds --method, and the flags of the methods that `argv` names; `argv` is scanned before it is parsed."""
    parser.add_argument(
        "--method", default=DEFAULT, choices=sorted(CATALOGUE), help=f"how to quantize (default: {DEFAULT})"
    )
    _add_fields(parser, argv, CATALOGUE[_named(argv, "--method", CATALOGUE) or DEFAULT](), "")


def _add_fields(parser: argparse.ArgumentParser, argv: Sequence[str], method: Any, prefix: str) -> None:
    where = f" in --{prefix[:-1]}" if prefix else ""
    group = parser.add_argument_group(f"fields of the method {method.name}{where}")
    inner = _methods_in(method)
    add_fields(group, method, prefix, inner)
    for field, held in inner.items():
        dest = f"{prefix}{field}"
        flag = f"--{dest.replace('_', '-')}"
        words = f"a method, whose fields are flags that start with {flag}- (default: {_name(held)})"
        names = [*sorted(CATALOGUE), *([_NONE] if _is_optional(type(method), field) else [])]
        group.add_argument(flag, dest=dest, choices=names, help=words)
        chosen = _named(argv, flag, names) or _name(held)
        if chosen != _NONE:
            # What the default has set stays where the flag names its class.
            start = held if type(held) is CATALOGUE[chosen] else CATALOGUE[chosen]()
            _add_fields(parser, argv, start, f"{dest}-")


def method_from(args: argparse.Namespace, name: str | None = None, **fixed: Any) -> Any:
    """The method that the command line describes.

    Args:
      args: the parsed command line.
      name: another method to build instead; it takes those of the given fields that it has too, if it may hold their
        values: integers of 8 bits have no use for the dtype of learned tables.
      fixed: values of fields, which override those of the command line.

    Raises:
      CommandLineError: the method refuses the values.
    """
    cls = CATALOGUE[name or args.method]
    if name is not None:
        args = only_held(args, cls)
    return _described(args, cls, None, "", fixed)


def short_name(name: str) -> tuple[str, dict[str, int]] | None:
    """The catalogue's name of a method, and its bits if the name gives them ("int8"); None if there is no such one."""
    if name in CATALOGUE:
        return name, {}
    if name[:-1] == "int" and name[-1] in "2345678":
        return "int", {"bits": int(name[-1])}
    return None


def named_method(text: str) -> tuple[str, str, dict[str, int]]:
    """The type of a flag whose value names a method: the name as given, and what `short_name` says of it."""
    found = short_name(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, need one of {', '.join(sorted(CATALOGUE))}, int2 to int8")
    return text, *found


def _described(args: argparse.Namespace, cls: type, held: Any, prefix: str, fixed: dict[str, Any]) -> Any:
    """A method of class `cls` with the fields that were given; the others come from `held` if that is of the class,
    else from the defaults."""
    start = held if type(held) is cls else cls()
    inner = {}
    for field, method in _methods_in(start).items():
        named = getattr(args, f"{prefix}{field}", None)
        # The flag may be another method's, whose field of this name is optional where this one's is not.
        if named is None or (named == _NONE and not _is_optional(cls, field)):
            named = _name(method)
        inner[field] = None if named == _NONE else _described(args, CATALOGUE[named], method, f"{prefix}{field}-", {})
    return build(start, args, prefix, **inner | fixed)


def _methods_in(method: Any) -> dict[str, Any]:
    """The fields of a method that hold methods, with the methods that they hold, or None where a field may hold one."""
    held = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return {
        name: value
        for name, value in held.items()
        if getattr(value, "name", None) in CATALOGUE or (value is None and _may_hold_method(type(method), name))
    }


def _may_hold_method(cls: type, field: str) -> bool:
    """Whether the type of a field names a protocol of methods, or a class of the catalogue or a base of one."""
    return any(
        isinstance(hint, type)
        and (
            AnyMethod in hint.__mro__
            or (dataclasses.is_dataclass(hint) and any(issubclass(known, hint) for known in CATALOGUE.values()))
        )
        for hint in _hints(cls, field)
    )


def _is_optional(cls: type, field: str) -> bool:
    return type(None) in _hints(cls, field)


def _hints(cls: type, field: str) -> tuple[Any, ...]:
    """The type of a field, or the members of it if it is a union."""
    hint = typing.get_type_hints(cls)[field]
    return typing.get_args(hint) or (hint,)


def _name(method: Any) -> str:
    return _NONE if method is None else method.name


def _named(argv: Sequence[str], flag: str, names: Collection[str]) -> str | None:
    """The one of `names` that a command line gives for a flag; None if it gives no value, or another."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scan.add_argument(flag, dest="name")
    try:
        name = scan.parse_known_args(argv)[0].name
    except argparse.ArgumentError:  # the flag without a value: the full parser says so
        return None
    return name if name in names else None
