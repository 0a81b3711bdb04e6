"""The file that a benchmark writes: what ran, where, with which versions, and the figures in rows.

It is one JSON object with the fields of `Result`, and "schema", the version of this format. `write` and `read` both
check it, so every file that was written can be read.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from any4_jax.benchmarks.files import write_whole

SCHEMA = 1
VERSIONED = ("any4_jax", "jax", "jaxlib", "python")
# The name of a float contains one of these words: `us`, `gb_per_s`, `share_of_streaming_read`.
UNITS = frozenset(
    {"us", "ms", "s", "seconds", "bits", "bytes", "mb", "gb", "tokens", "nats", "perplexity"}
    | {"ratio", "share", "error", "percent", "launches"}
)


@dataclasses.dataclass(frozen=True)
class Device:
    """The device that a benchmark ran on.

    Attributes:
      name: the model of the processor or GPU.
      platform: "cpu", "cuda", "rocm" or "tpu".
      cores: the logical cores of the host that the process may use.
      features: instruction sets, or the compute capability of a GPU.
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
      command: the command line that runs it again, with the environment variables that matter.
      date: UTC, such as "2026-01-31T23:59:59Z".
      device: see `Device`.
      versions: of python, jax, jaxlib, any4_jax and whatever else was measured.
      settings: the values that held for all rows; they have the same types as values of rows.
      notes: sentences that say what could not be measured, and why.
      rows: the figures: strings, numbers, booleans, or None if a value doesn't apply; all rows have the same keys.
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
    """Raises ValueError, in one sentence, for the first field that isn't as the classes say."""
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
        raise ValueError("there are no rows, and at least one is needed; write no file if nothing was measured")
    for number, row in enumerate(result.rows, 1):
        _check_scalars(f"row {number}", row)
        differing = sorted(set(row) ^ set(result.rows[0]))
        if differing:
            raise ValueError(
                f"row {number} and row 1 differ in the keys {', '.join(differing)}, and all rows need the same keys; "
                "use null if a value doesn't apply"
            )


def write(path: str | Path, result: Result) -> None:
    """Checks a result, and writes it as a whole or not at all.

    Raises:
      ValueError: see `check`; the message starts with the path.
      OSError: the file can't be written.
    """
    path = Path(path)
    _check_for(path, result)
    write_whole(path, json.dumps(as_json(result), indent=1, allow_nan=False) + "\n")


def as_json(result: Result) -> dict[str, Any]:
    """A result as the JSON object that a file holds."""
    return {"schema": SCHEMA} | dataclasses.asdict(result)


def read(path: str | Path) -> Result:
    """The checked result in a file.

    Raises:
      ValueError: the file doesn't have this format; the message starts with the path.
      OSError: the file can't be read.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: it is not JSON ({error}), and a benchmark's result is needed; run the benchmark again"
        ) from None
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
    """The dataclass of a JSON object that has exactly its fields."""
    fields = {field.name for field in dataclasses.fields(cls)}
    got = set(_mapping(where, content))
    if got != fields:
        faults = [f"lacks {name}" for name in sorted(fields - got)] + [f"has {name}" for name in sorted(got - fields)]
        raise ValueError(f"{where} {', '.join(faults)}, and needs exactly {', '.join(sorted(fields))}; fix it")
    return cls(**content)


def _mapping(name: str, value: Any) -> Mapping:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} has type {type(value).__name__}, and an object is needed; fix it")
    return value


def _list(name: str, value: Any) -> tuple:
    if not isinstance(value, list):
        raise ValueError(f"{name} has type {type(value).__name__}, and a list is needed; fix it")
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
