"""Creates command-line flags from the fields of a dataclass, so that a new method needs no code here."""

import argparse
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection
from typing import Any, Literal

import jax.numpy as jnp

from any4_jax.cli.errors import CommandLineError
from any4_jax.methods.fields import takes

# Flags are stored under names with this prefix, which no other argument of a command has.
_PREFIX = "field."


def add_fields(
    parser: argparse._ActionsContainer, config: Any, prefix: str = "", skipped: Collection[str] = ()
) -> None:
    """Adds a flag for each field of the dataclass `config`.

    int, float and str take a value; bool becomes --x / --no-x; Literal becomes choices; `X | None` also takes
    "none"; a str field named ..._dtype takes the name of a dtype. The help text is the field's entry under
    "Attributes:" in the docstring.

    Args:
      parser: gets the flags.
      config: the dataclass, or an instance whose fields are the defaults that the help tells.
      prefix: what the flags start with, such as "inner-" for the fields of a method in a method.
      skipped: the names of fields that get no flag here, such as those that hold a method. A field whose default is a
        dataclass gets none either.

    Raises:
      TypeError: a field has a type that a flag can't give.
    """
    cls = config if isinstance(config, type) else type(config)
    hints, described = typing.get_type_hints(cls), _attributes(cls)
    for field in dataclasses.fields(cls):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = default if cls is config else getattr(config, field.name)
        if field.name in skipped or dataclasses.is_dataclass(default):
            continue
        common: dict[str, Any] = {
            "dest": _PREFIX + prefix + field.name,
            "default": argparse.SUPPRESS,  # the dataclass has the default
            "help": _help(described.get(field.name, ""), default),
        }
        flag = f"--{prefix}{field.name}".replace("_", "-")
        hint, optional = _without_none(hints[field.name])
        if hint is bool and not optional:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
            continue
        convert, metavar = _converter(hint, field.name, cls)
        if optional:
            convert, metavar = _or_none(convert), f"{metavar}|none"
        parser.add_argument(flag, type=convert, metavar=metavar, **common)


def build(config: Any, args: argparse.Namespace, prefix: str = "", **fixed: Any) -> Any:
    """A dataclass with the fields that were given on the command line; flags of other dataclasses are ignored.

    Args:
      config: the dataclass, or an instance that provides the fields that were not given.
      args: the parsed command line.
      prefix: the prefix of the flags, as for `add_fields`.
      fixed: values of fields, which override those of the command line.

    Raises:
      CommandLineError: the dataclass refuses the values.
    """
    given = given_values(config, args, prefix)
    try:
        return config(**given | fixed) if isinstance(config, type) else dataclasses.replace(config, **given | fixed)
    except (ValueError, TypeError) as error:
        raise CommandLineError(str(error)) from error


def given(config: type, args: argparse.Namespace, prefix: str = "") -> list[str]:
    """The flags of the dataclass `config` that are on the command line."""
    return [f"--{prefix}{name}".replace("_", "-") for name in given_values(config, args, prefix)]


def given_values(config: type, args: argparse.Namespace, prefix: str = "") -> dict[str, Any]:
    """The values that the command line gives to fields of the dataclass `config`."""
    names = {_PREFIX + prefix + field.name: field.name for field in dataclasses.fields(config)}
    return {names[name]: value for name, value in vars(args).items() if name in names}


def only_held(args: argparse.Namespace, cls: type) -> argparse.Namespace:
    """The command line without the values that fields of a dataclass may not hold."""
    names = {_PREFIX + field.name: field.name for field in dataclasses.fields(cls)}
    return argparse.Namespace(
        **{flag: value for flag, value in vars(args).items() if flag not in names or takes(cls, names[flag], value)}
    )


def checked(method: Any, stats_given: bool) -> Any:
    """The method, after checking that its fields don't contradict each other.

    Raises:
      CommandLineError: they do, or they need statistics and `stats_given` is False.
    """
    try:
        method.check(stats_given)
    except ValueError as error:
        raise CommandLineError(str(error)) from error
    return method


def _attributes(config: type) -> dict[str, str]:
    """Field name -> text, from the "Attributes:" section of a class's docstring."""
    _, _, section = (inspect.getdoc(config) or "").partition("Attributes:\n")
    if not section:
        return {}
    indent = len(section) - len(section.lstrip(" "))
    entries = re.findall(rf"^ {{{indent}}}(\w+(?:, \w+)*): (.*(?:\n {{{indent + 1},}}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def _help(text: str, default: Any) -> str:
    shown = "" if default is dataclasses.MISSING else f"(default: {'none' if default is None else default})"
    return f"{text} {shown}".strip().replace("%", "%%")  # argparse formats help with %


def _without_none(hint: Any) -> tuple[Any, bool]:
    """`X | None` -> (X, True), Literal["a", None] -> (Literal["a"], True), anything else -> (itself, False)."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal and None in arguments:
        return Literal[tuple(value for value in arguments if value is not None)], True
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) in arguments:
        rest = [argument for argument in arguments if argument is not type(None)]
        if len(rest) == 1:
            return rest[0], True
    return hint, False


def _converter(hint: Any, name: str, config: type) -> tuple[Callable[[str], Any], str]:
    if typing.get_origin(hint) is Literal:
        choices = {str(value): value for value in typing.get_args(hint)}
        return _choice(choices), "|".join(choices)
    if hint is str and name.endswith("_dtype"):
        return _dtype_name, "DTYPE"
    if hint in (int, float, str):
        return hint, hint.__name__.upper()
    raise TypeError(
        f"the field {config.__name__}.{name} has type {hint}, which no flag can give; "
        "use int, float, str, bool, Literal, or one of these or None"
    )


def _choice(choices: dict[str, Any]) -> Callable[[str], Any]:
    def choice(text: str) -> Any:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"got {text!r}, need one of {', '.join(choices)}")
        return choices[text]

    return choice


def _or_none(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def converted(text: str) -> Any:
        return None if text == "none" else convert(text)

    # When argparse refuses a value, it names the converter ("invalid int value: ...").
    converted.__name__ = convert.__name__
    return converted


def _dtype_name(text: str) -> str:
    try:
        return jnp.dtype(text).name
    except TypeError:
        raise argparse.ArgumentTypeError(f"got {text!r}, need a dtype such as bfloat16, float16 or float32") from None
