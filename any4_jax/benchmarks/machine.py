"""Where figures were measured, and how: device, versions, memory, and command line."""

import os
import platform as host
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from any4_jax.benchmarks.schema import VERSIONED, Device, Result
from any4_jax.choice import default_platform as platform

__all__ = ["available_bytes", "command_line", "cores", "device", "platform", "result"]

# Those of a processor's hundred flags that a product with few-bit weights can use.
FEATURES = (
    *("avx2", "fma", "f16c", "bmi2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi"),
    *("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)
# Environment variables that change what a command measures.
ENVIRONMENT = ("JAX_PLATFORMS", "XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE")


def result(
    benchmark: str,
    command: Sequence[str],
    *,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
    packages: Sequence[str] = (),
) -> Result:
    """A `Result` of this process, dated now.

    Args:
      benchmark: the benchmark's name.
      command: the words of the command line.
      settings, rows, notes: see `Result`.
      packages: distributions whose versions matter, besides those that every result has.
    """
    versions = {name: host.python_version() if name == "python" else _version(name) for name in VERSIONED}
    return Result(
        benchmark=benchmark,
        command=command_line(command),
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        device=device(),
        versions=versions | {name: _version(name) for name in packages},
        settings=settings,
        notes=tuple(notes),
        rows=tuple(rows),
    )


def device() -> Device:
    """The default device of this process."""
    where = platform()
    if where == "cpu":
        name, flags = _processor()
        return Device(name, where, cores(), tuple(flag for flag in FEATURES if flag in flags))
    first = jax.devices()[0]
    capability = getattr(first, "compute_capability", None)
    return Device(
        first.device_kind, where, cores(), () if capability is None else (f"compute capability {capability}",)
    )


def cores() -> int:
    """The number of logical cores that this process may use; XLA starts as many threads."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_bytes() -> int | None:
    """Bytes that are free for arrays on the default device; None if that can't be known."""
    if platform() == "cpu":
        kilobytes = _proc("meminfo").get("MemAvailable", "").removesuffix("kB").strip()
        return int(kilobytes) * 1024 if kilobytes.isdigit() else None
    stats = jax.devices()[0].memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if {"bytes_limit", "bytes_in_use"} <= set(stats) else None


def command_line(words: Sequence[str]) -> str:
    """The command line as one would type it, after the environment variables that matter."""
    given = {name: os.environ.get(name) for name in ENVIRONMENT}
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in given.items() if value), shlex.join(words)])


def _processor() -> tuple[str, frozenset[str]]:
    """The processor's name and flags."""
    facts = _proc("cpuinfo")
    name = facts.get("model name") or host.processor() or host.machine()
    return name, frozenset((facts.get("flags") or facts.get("Features") or "").split())


def _proc(name: str) -> dict[str, str]:
    """The first "key: value" of each key in a file of /proc; empty if there is no such file."""
    path = Path("/proc") / name
    facts: dict[str, str] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    return facts


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
