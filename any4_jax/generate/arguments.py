"""Checks of arguments: each fault is one sentence that says what was got, what is needed and what to do."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any


def integer(name: str, value: Any, least: int, most: int | None = None, advice: str = "") -> int:
    """`value` as an int.

    Raises:
        TypeError: it is no integer, or a bool.
        ValueError: it is below `least` or above `most`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {value!r}, and an integer is needed{advice}")
    number = int(value)
    if number < least or (most is not None and number > most):
        need = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name} is {number}, and {need} is needed{advice}")
    return number


def real(name: str, value: Any, fits: Callable[[float], bool], need: str) -> float:
    """`value` as a float that `fits`; `need` says which do, and what to do.

    Raises:
        TypeError: it is no real number, or a bool.
        ValueError: it is not finite, or doesn't fit.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}, and {need}")
    if not math.isfinite(value) or not fits(float(value)):
        raise ValueError(f"{name} is {value}, and {need}")
    return float(value)
