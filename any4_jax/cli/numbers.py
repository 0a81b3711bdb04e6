"""Types of numeric flags: what is out of range is refused where the command line is parsed."""

import argparse
import math
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """The type of a flag whose value is a whole number of `least` or more."""

    def whole(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or number >= 2**31:
            raise argparse.ArgumentTypeError(f"got {text!r}, need a whole number of at least {least}")
        return number

    return whole


count = at_least(1)
natural = at_least(0)


def between(low: float, high: float, *, open_low: bool = False) -> Callable[[str], float]:
    """The type of a flag whose value is a finite number from `low` to `high`, without `low` itself if it is open."""
    above = f"above {low:g}" if open_low else f"of at least {low:g}"
    words = above if math.isinf(high) else f"{above} and at most {high:g}"

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high) or (open_low and value == low):
            raise argparse.ArgumentTypeError(f"got {text!r}, need a number {words}")
        return value

    return number
