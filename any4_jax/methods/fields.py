"""The fields of methods, checked by their annotated types."""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

import pydantic

from any4_jax.methods.base import AnyMethod

_CONFIG = pydantic.ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


class Fields:
    """A base of methods that checks their fields as soon as one is constructed.

    What a field may hold is its annotation: `bits: Literal[2, 3, 4]`, `group_size: Count | None`, or any type that
    pydantic knows. Methods that don't derive from it are checked when they are applied.
    """

    def __post_init__(self) -> None:
        check_fields(self)


def check_fields(method: Any) -> None:
    """Checks the fields of a dataclass: no text is read as a number, no bool or float as an int, and no float is NaN
    or infinite.

    Raises:
      ValueError: a value is not of the annotated type of its field; the message names the field.
    """
    for name, fault in _checks(type(method)).items():  # type: ignore[arg-type]
        value = getattr(method, name)
        need = fault(value)
        if need is not None:
            raise ValueError(f"got {name}={value!r} for {type(method).__name__}, need {need}; choose such a value")


def takes(cls: type, name: str, value: Any) -> bool:
    """Whether the dataclass has a field of this name that may hold the value."""
    check = _checks(cls).get(name)  # type: ignore[arg-type]
    return check is not None and check(value) is None


@functools.cache
def _checks(cls: type) -> dict[str, Callable[[Any], str | None]]:
    """For each field, the function from its value to what is needed in words, or to None if the value will do."""
    if not dataclasses.is_dataclass(cls):
        return {}
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except NameError:  # an annotation of a name that is not in the module: nothing is known of its type
        return {}
    return {field.name: _check_of(hints[field.name]) for field in dataclasses.fields(cls)}


def _check_of(hint: Any) -> Callable[[Any], str | None]:
    members = typing.get_args(hint) or (hint,)
    methods = tuple(
        m for m in members if isinstance(m, type) and (AnyMethod in m.__mro__ or dataclasses.is_dataclass(m))
    )
    if methods:
        return functools.partial(_method_fault, methods=methods, optional=type(None) in members)
    try:
        adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(hint, config=_CONFIG)
    except pydantic.errors.PydanticUserError:  # a type that pydantic can't check
        return lambda value: None
    return functools.partial(_plain_fault, adapter=adapter)


def _method_fault(value: Any, methods: tuple[type, ...], optional: bool) -> str | None:
    # A protocol of methods with data members can't be asked for by isinstance.
    fits = any(
        hasattr(value, "check") and hasattr(value, "needs") if AnyMethod in cls.__mro__ else isinstance(value, cls)
        for cls in methods
    )
    if fits and not isinstance(value, type) or (value is None and optional):
        return None
    return f"an instance of {' or '.join(cls.__name__ for cls in methods)}{' or None' if optional else ''}"


def _plain_fault(value: Any, adapter: pydantic.TypeAdapter[Any]) -> str | None:
    try:
        found = adapter.validate_python(value)
    except pydantic.ValidationError as error:
        need = error.errors(include_url=False)[0]["msg"].removeprefix("Input should be ")
        return f"a number {need}" if need.startswith(("greater", "less")) else need
    # Literal types take True for 1 and 4.0 for 4.
    alike = type(found) is type(value) or (type(found) is float and type(value) is int)
    return None if alike else f"the {type(found).__name__} {found!r}"
