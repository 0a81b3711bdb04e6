"""What a file says is checked by type and range, and a fault is one sentence."""

from __future__ import annotations

import dataclasses
import math

import pytest

from any4_jax.schema import Count, Index, Positive, Schema, check, read_json


class Inner(Schema):
    factor: Positive
    name: str | None = None


class Outer(Schema):
    size: Count
    rate: float = 1.0
    flag: bool = False
    inner: Inner | None = None
    ends: Index | tuple[Index, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    size: Count
    ends: tuple[int, ...] = ()


def test_what_fits_is_taken_and_unknown_keys_are_ignored() -> None:
    got = check(Outer, {"size": 3, "rate": 2, "inner": {"factor": 1.5}, "ends": [1, 2], "other": {}}, "a.json", "do")
    assert got == Outer(size=3, rate=2.0, inner=Inner(factor=1.5), ends=(1, 2))
    assert check(Plain, {"size": 3, "ends": [4]}, "a.json", "do") == Plain(size=3, ends=(4,))


@pytest.mark.parametrize(
    "content, said",
    [
        ({}, "a.json lacks size; do"),
        ({"size": 0}, "a.json: size is 0, and greater than or equal to 1 is needed; do"),
        ({"size": "3"}, "a.json: size is '3', and a valid integer is needed; do"),
        ({"size": True}, "a.json: size is True, and a valid integer is needed; do"),
        ({"size": 1e308}, "size is 1e+308"),
        ({"size": 10**400}, "size is 1000"),
        ({"size": 1, "rate": math.nan}, "rate is nan, and a finite number is needed"),
        ({"size": 1, "rate": "8"}, "rate is '8', and a valid number is needed"),
        ({"size": 1, "inner": {}}, "a.json: inner lacks factor; do"),
        ({"size": 1, "inner": {"factor": -1}}, "inner.factor is -1, and greater than 0 is needed"),
        ({"size": 1, "inner": "dynamic"}, "inner is 'dynamic'"),
        ({"size": 1, "ends": [1, -2]}, "a.json: ends"),
        ([], "a.json: it is []"),
    ],
)
def test_what_does_not_fit_is_one_sentence(content, said) -> None:
    with pytest.raises(ValueError) as caught:
        check(Outer, content, "a.json", "do")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "content, said",
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b"\xff", "is not JSON"),
        (b"", "is not JSON"),
        (b"[1]", "holds a list"),
    ],
)
def test_json_that_is_no_object_is_refused(content, said) -> None:
    with pytest.raises(ValueError, match=said):
        read_json(content, "a.json")
