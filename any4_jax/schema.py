"""Checks what a file says against a declared schema; what is wrong becomes one sentence that names file and key."""

import functools
import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import Field

from any4_jax.one_line import one_line

T = TypeVar("T")

Count = Annotated[int, Field(ge=1, lt=2**31)]
"""A size: how many of something there are."""
Index = Annotated[int, Field(ge=0, lt=2**31)]
"""A place in a list, such as a token's id."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
"""A number that is neither NaN nor infinite; a `Schema` refuses these for every float, a dataclass for this type."""
Positive = Annotated[Finite, Field(gt=0)]
"""A finite number above 0."""
NotNegative = Annotated[Finite, Field(ge=0)]
"""A finite number of at least 0."""
Share = Annotated[Finite, Field(ge=0, le=1)]
"""A part of a whole: from 0, none, to 1, all of it."""
Portion = Annotated[Finite, Field(gt=0, lt=1)]
"""A part of a whole that is neither none nor all of it."""


def _printable(text: str) -> str:
    if not 0 < len(text) <= _LONGEST_NAME or not text.isprintable():
        raise ValueError(f"a name of 1 to {_LONGEST_NAME} printable characters")
    return text


Name = Annotated[str, pydantic.AfterValidator(_printable)]
"""The name of a kind, such as an activation: what a message may repeat."""

_SHOWN = 60
_LONGEST_NAME = 100


class Schema(pydantic.BaseModel):
    """The base of schemas whose objects have no other use; `check` takes dataclasses as well.

    No text is read as a number and no bool as an int; an int is taken where a float is declared. Keys without a field
    are ignored.
    """

    model_config = pydantic.ConfigDict(frozen=True, allow_inf_nan=False)


def check(schema: type[T], content: Any, source: str, advice: str) -> T:
    """`content`, as an instance of a schema.

    Args:
      schema: a `Schema`, a dataclass, or any type with annotations that pydantic knows.
      content: JSON values.
      source: the name of the file, and where in it the content is; begins the message.
      advice: what to do if it doesn't fit; ends the message.

    Raises:
      ValueError: a key is missing, or its value has another type or range: the message says which, what was got and
        what is needed.
    """
    try:
        # As JSON, because only there strict mode takes a list for a tuple.
        return _adapter(schema).validate_json(json.dumps(content), strict=True)  # type: ignore[arg-type]
    except pydantic.ValidationError as error:
        raise ValueError(f"{source}{_complaint(error, content)}; {advice}") from None
    except (RecursionError, TypeError) as error:
        raise ValueError(f"{source} doesn't hold plain JSON values ({type(error).__name__}); {advice}") from None


def read_json(content: bytes | str, source: str, advice: str = "fetch it again") -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      ValueError: the content is not JSON, not UTF-8, nested too deeply, or no object.
    """
    try:
        parsed = json.loads(content)
    except RecursionError:
        raise ValueError(f"{source} is nested too deeply to be read; {advice}") from None
    except ValueError as error:
        raise ValueError(f"{source} is not JSON ({error}); {advice}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{source} holds a {type(parsed).__name__}, and an object is needed; {advice}")
    return parsed


@functools.cache
def _adapter(schema: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(schema)


def _complaint(error: pydantic.ValidationError, content: Any) -> str:
    """What is wrong first, as the middle of a sentence."""
    first = error.errors(include_url=False)[0]
    keys, value = [], content
    # Behind the keys of the content itself come names of pydantic's own, such as the branch of a union.
    for key in first["loc"]:
        if isinstance(value, Mapping) and key in value or isinstance(value, list) and key in range(len(value)):
            keys.append(key)
            value = value[key]  # type: ignore[index,call-overload]
    place = one_line(".".join(map(str, keys)), _SHOWN)
    if first["type"] == "missing":
        return f"{f': {place}' if place else ''} lacks {first['loc'][-1]}"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f": {place} is unknown"
    need = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    shown = repr(value) if len(repr(value)) <= _SHOWN else f"{repr(value)[:_SHOWN]}..."
    return f": {place or 'it'} is {shown}, and {need} is needed"
