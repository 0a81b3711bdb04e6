"""The metadata of a GGUF file, and its values with the type and range that they need."""

import types
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from any4_jax.one_line import shown
from any4_jax.schema import Count, Finite, Index, Positive, check

D = TypeVar("D")

REQUIRED: Any = object()
"""The default of a value that must be there."""

_ADVICE = "convert the model again"


class Values(ABC):
    """Reads values of declared types. A value that is missing is the default; without a default it is refused.

    Attributes:
        path: the file, for messages.
    """

    path: Path

    @abstractmethod
    def look_up(self, key: str) -> tuple[str, Any]:
        """The full key, and its value; None if it is missing."""

    def single(self, key: str, value: Any) -> Any:
        """What a value says where one number, text or flag is needed."""
        return value

    def value(self, key: str, schema: Any, default: D = REQUIRED) -> Any | D:
        """A value of any type, such as `list[str]`.

        Args:
            key: the key.
            schema: a type that pydantic knows; bools aren't ints, and ints are floats.
            default: what a missing key means.

        Raises:
            ValueError: the key is missing and there is no default, or its value has another type or range. The message
                names file and key, and says what was got and what is needed.
        """
        full, value = self.look_up(key)
        return self._checked(full, value, schema, default)

    def count(self, key: str, default: D = REQUIRED) -> int | D:
        """An integer of at least 1 and below 2**31. Raises ValueError, see `value`."""
        return self._one(key, Count, default)

    def index(self, key: str, default: D = REQUIRED) -> int | D:
        """An integer of at least 0 and below 2**31. Raises ValueError, see `value`."""
        return self._one(key, Index, default)

    def finite(self, key: str, default: D = REQUIRED) -> float | D:
        """A number that is neither NaN nor infinite. Raises ValueError, see `value`."""
        return self._one(key, Finite, default)

    def positive(self, key: str, default: D = REQUIRED) -> float | D:
        """A finite number above 0. Raises ValueError, see `value`."""
        return self._one(key, Positive, default)

    def text(self, key: str, default: D = REQUIRED) -> str | D:
        """A text. Raises ValueError, see `value`."""
        return self._one(key, str, default)

    def flag(self, key: str, default: D = REQUIRED) -> bool | D:
        """True or false. Raises ValueError, see `value`."""
        return self._one(key, bool, default)

    def _one(self, key: str, schema: Any, default: Any) -> Any:
        full, value = self.look_up(key)
        return self._checked(full, self.single(full, value), schema, default)

    def _checked(self, full: str, value: Any, schema: Any, default: Any) -> Any:
        if value is None:
            if default is REQUIRED:
                raise ValueError(f"{self.path} lacks {shown(full)}; {_ADVICE}")
            return default
        # Checked under its key, so that the message names it.
        named: Any = types.GenericAlias(dict, (str, schema))
        return check(named, {full: value}, str(self.path), _ADVICE)[full]


class Metadata(Values, Mapping[str, Any]):
    """Full key -> number, bool, text, or a list of these.

    A text that is not UTF-8 makes only its own key unusable: a look-up of that key is refused, and the file is read as
    if nobody had asked for it. So no text is ever altered, and a damaged description spoils no model.
    """

    def __init__(self, path: Path, values: dict[str, Any], undecodable: Mapping[str, bytes]) -> None:
        """Keeps the values.

        Args:
            path: the file.
            values: all of them; what those of undecodable keys are doesn't matter.
            undecodable: key -> the first text of its value that is not UTF-8.
        """
        self.path = path
        self._values, self._undecodable = values, undecodable

    @classmethod
    def joined(cls, path: Path, parts: Sequence["Metadata"], different: frozenset[str]) -> "Metadata":
        """The metadata of all parts of a file.

        Args:
            path: the file, for messages.
            parts: those of each part; the first one has nearly all keys.
            different: keys with another value in each part; the first part's is kept.

        Raises:
            ValueError: a key has different values in two parts.
        """
        values: dict[str, Any] = {}
        for part in parts:
            for key, value in part._values.items():
                # As texts, because NaN is not equal to itself.
                if key not in different and key in values and repr(values[key]) != repr(value):
                    raise ValueError(
                        f"{shown(key)} of {part.path} is {shown(value)}, and {shown(values[key])} in the parts before "
                        "it: they are parts of different models; fetch them again"
                    )
                values.setdefault(key, value)
        undecodable = {key: text for part in reversed(parts) for key, text in part._undecodable.items()}
        return cls(path, values, undecodable)

    def look_up(self, key: str) -> tuple[str, Any]:
        return key, self.get(key)

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if key in self._undecodable:
            raise ValueError(
                f"{shown(key)} of {self.path} holds {shown(self._undecodable[key])}, and UTF-8 is needed; {_ADVICE}"
            )
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
