"""The file that a benchmark writes: what ran, where, with which versions, and the figures in rows.

It is one JSON object of `Result`'s fields and "schema", the number of this form. `write` and `read` both check it, so a
file that is there is one that can be read.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

SCHEMA = 1
VERSIONED = ("any4_jax", "jax", "jaxlib", "python")
# A float's name has one of these among its words: `us`, `gb_per_s`, `share_of_streaming_read`.
UNITS = frozenset(
    {"us", "ms", "s", "seconds", "bits", "bytes", "mb", "gb", "tokens", "nats", "perplexity"}
    | {"ratio", "share", "error", "percent"}
)


@dataclasses.dataclass(frozen=True)
class Device:
    """What it ran on.

    Attributes:
      name: the processor's or GPU's model.
      platform: "cpu", "cuda", "rocm" or "tpu".
      cores: logical cores that the process might use, of the host where the device is a GPU.
      features: instruction sets, or a GPU's compute capability.
    """

    name: str
    platform: str
    cores: int
    features: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """One run of one benchmark.

    Attributes:
      benchmark: its name.
      command: what to type to run it again, with the environment variables that matter.
      date: UTC, "2026-01-31T23:59:59Z".
      device: see `Device`.
      versions: of python, jax, jaxlib, any4_jax and whatever else was measured.
      settings: what held for all rows, of the same types.
      notes: sentences: what could not be measured, and why.
      rows: the figures: texts, numbers, booleans; all have the same keys, and None stands where a value doesn't apply.
    """

    benchmark: str
    command: str
    date: str
    device: Device
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    notes: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]


def check(result: Result) -> None:
    """Raises ValueError with the first thing that is not as the classes say, in one sentence."""
    for name in ("benchmark", "command", "date"):
        _check_text(name, getattr(result, name))
    _check_date(result.date)
    _check_device(result.device)
    for name, version in _mapping("versions", result.versions).items():
        _check_text(f"the version of {name}", version)
    absent = sorted(set(VERSIONED) - set(result.versions))
    if absent:
        raise ValueError(f"versions lack {', '.join(absent)}, and {', '.join(VERSIONED)} are needed; add them")
    _check_scalars("settings", result.settings)
    for note in result.notes:
        _check_text("a note", note)
    if not result.rows:
        raise ValueError("there are no rows, and at least one is needed; write nothing where nothing was measured")
    for number, row in enumerate(result.rows, 1):
        _check_scalars(f"row {number}", row)
        differing = sorted(set(row) ^ set(result.rows[0]))
        if differing:
            raise ValueError(
                f"row {number} and row 1 differ in the keys {', '.join(differing)}, and all rows need the same; "
                "give null where a value doesn't apply"
            )


def write(path: str | Path, result: Result) -> None:
    """Checks a result and writes it, whole or not at all.

    Raises:
      ValueError: see `check`; the sentence starts with the path.
      OSError: the file can't be written.
    """
    path = Path(path)
    _check_for(path, result)
    text = json.dumps({"schema": SCHEMA} | dataclasses.asdict(result), indent=1, allow_nan=False) + "\n"
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(scratch, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def read(path: str | Path) -> Result:
    """The result in a file, checked.

    Raises:
      ValueError: it is none of this form; the sentence starts with the path.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: got no JSON ({error}), need a benchmark's result; run the benchmark again") from None
    number = content.get("schema") if isinstance(content, dict) else None
    if number != SCHEMA:
        raise ValueError(f"{path}: got schema {number!r}, need {SCHEMA}; run the benchmark again, or upgrade any4_jax")
    try:
        result = _of(Result, {name: value for name, value in content.items() if name != "schema"}, "the file")
        device = _of(Device, result.device, "device")
        features, notes, rows = (
            _list(name, value)
            for name, value in (("features", device.features), ("notes", result.notes), ("rows", result.rows))
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    result = dataclasses.replace(result, device=dataclasses.replace(device, features=features), notes=notes, rows=rows)
    _check_for(path, result)
    return result


def _check_for(path: Path, result: Result) -> None:
    try:
        check(result)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _of(cls: type, content: Any, where: str) -> Any:
    """The dataclass from a JSON object that has exactly its fields."""
    fields = {field.name for field in dataclasses.fields(cls)}
    got = set(_mapping(where, content))
    if got != fields:
        faults = [f"lacks {name}" for name in sorted(fields - got)] + [f"has {name}" for name in sorted(got - fields)]
        raise ValueError(f"{where} {', '.join(faults)}, and needs exactly {', '.join(sorted(fields))}; mend it")
    return cls(**content)


def _mapping(name: str, value: Any) -> Mapping:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is of type {type(value).__name__}, and an object is needed; mend it")
    return value


def _list(name: str, value: Any) -> tuple:
    if not isinstance(value, list):
        raise ValueError(f"{name} is of type {type(value).__name__}, and a list is needed; mend it")
    return tuple(value)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {value!r}, and a text is needed; fill it in")


def _check_date(date: str) -> None:
    fault = f"date is {date!r}, and UTC as 2026-01-31T23:59:59Z is needed; take it from datetime.now(timezone.utc)"
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", date):
        raise ValueError(fault)
    try:
        datetime.fromisoformat(date)
    except ValueError:
        raise ValueError(fault) from None


def _check_device(device: Device) -> None:
    _check_text("the device's name", device.name)
    _check_text("the device's platform", device.platform)
    if type(device.cores) is not int or device.cores < 1:
        raise ValueError(f"the device has cores={device.cores!r}, and a number above 0 is needed; count them")
    for feature in device.features:
        _check_text("a feature of the device", feature)


def _check_scalars(where: str, values: Any) -> None:
    for key, value in _mapping(where, values).items():
        _check_text(f"a key of {where}", key)
        if type(value) not in (str, int, float, bool, type(None)):
            raise ValueError(
                f"{where} holds {key} of type {type(value).__name__}, and a text, number, boolean or null is needed; "
                "flatten or convert it"
            )
        if type(value) is not float:
            continue
        if not math.isfinite(value):
            raise ValueError(f"{where} holds {key}={value}, and finite numbers are needed; measure again")
        if not UNITS & set(key.split("_")):
            raise ValueError(
                f"{where} holds {key}={value}, a name without a unit; put one of {', '.join(sorted(UNITS))} into it"
            )
