"""`--method NAME` and the flags of its fields. The flags of an inner method start with the name of the field that
holds it: `--method gptq --inner any4 --inner-bits 3`."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from any4_jax.cli.options import add_fields, build
from any4_jax.methods import CATALOGUE

DEFAULT = "any4"


def add_method(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Adds --method, and the flags of the methods that `argv` names; `argv` is scanned before it is parsed."""
    parser.add_argument(
        "--method", default=DEFAULT, choices=sorted(CATALOGUE), help=f"how to quantize (default: {DEFAULT})"
    )
    name = _named(argv, "--method") or DEFAULT
    _add_fields(parser, argv, CATALOGUE[name], "")


def _add_fields(parser: argparse.ArgumentParser, argv: Sequence[str], cls: Any, prefix: str) -> None:
    where = f" in --{prefix[:-1]}" if prefix else ""
    group = parser.add_argument_group(f"fields of the method {cls.name}{where}")
    add_fields(group, cls, prefix)
    for field, held in _methods_in(cls()).items():
        dest = f"{prefix}{field}"
        flag = f"--{dest.replace('_', '-')}"
        words = f"a method, whose fields are flags that start with {flag}- (default: {held.name})"
        group.add_argument(flag, dest=dest, choices=sorted(CATALOGUE), help=words)
        _add_fields(parser, argv, CATALOGUE[_named(argv, flag) or held.name], f"{dest}-")


def method_from(args: argparse.Namespace, name: str | None = None, **fixed: Any) -> Any:
    """The method that the command line describes.

    Args:
      args: the parsed command line.
      name: another method to build instead; it takes those of the given fields that it has too.
      fixed: values of fields, which override those of the command line.

    Raises:
      CommandLineError: the method refuses the values.
    """
    return _described(args, CATALOGUE[name or args.method], None, "", fixed)


def _described(args: argparse.Namespace, cls: type, held: Any, prefix: str, fixed: dict[str, Any]) -> Any:
    """A method of class `cls` with the fields that were given; the others come from `held` if that is of the class,
    else from the defaults."""
    start = held if type(held) is cls else cls()
    inner = {}
    for field, method in _methods_in(start).items():
        named = getattr(args, f"{prefix}{field}", None) or method.name
        inner[field] = _described(args, CATALOGUE[named], method, f"{prefix}{field}-", {})
    return build(start, args, prefix, **inner | fixed)


def _methods_in(method: Any) -> dict[str, Any]:
    """The fields of a method that hold methods, with the methods that they hold."""
    held = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return {name: value for name, value in held.items() if getattr(value, "name", None) in CATALOGUE}


def _named(argv: Sequence[str], flag: str) -> str | None:
    """The method that a command line gives for a flag; None if it gives none, or one that doesn't exist."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scan.add_argument(flag, dest="name")
    try:
        name = scan.parse_known_args(argv)[0].name
    except argparse.ArgumentError:  # the flag without a value: the full parser says so
        return None
    return name if name in CATALOGUE else None
