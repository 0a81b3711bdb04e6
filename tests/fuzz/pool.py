"""Runs cases in processes of their own: a crash or a hang ends one process and is a finding."""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent.parent
COMMAND = ("-m", "fuzz.worker")
SECONDS = 150.0
"""Of one case. Most take less than one; the first one of a process waits for its imports, on a busy machine too."""


class Outcome(NamedTuple):
    """How a case ended; the verdict is "result", "refused" or "finding"."""

    kind: str
    number: int
    verdict: str
    change: str
    words: str

    def __str__(self) -> str:
        again = f"PYTHONPATH=tests .venv/bin/python -m fuzz {self.kind}:{self.number}"
        return f"{self.verdict}: {self.change!r}\n  {self.words}\n  again: {again}"


class Worker:
    """One process, started anew after each case that it doesn't survive."""

    def __init__(self, originals: Path) -> None:
        self._originals = originals
        self._process: subprocess.Popen[str] | None = None

    def run(self, kind: str, number: int) -> Outcome:
        if self._process is None:
            self._process = self._started()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{kind} {number}\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], SECONDS)[0]:
            self.stop()
            return Outcome(kind, number, "finding", "", f"no answer within {SECONDS:.0f} s")
        line = process.stdout.readline()
        if not line:
            code = process.wait()
            self.stop()
            return Outcome(kind, number, "finding", "", f"the process ended with exit code {code}")
        return Outcome(kind, number, *json.loads(line))

    def _started(self) -> subprocess.Popen[str]:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
        }
        return subprocess.Popen(
            [sys.executable, *COMMAND, str(self._originals)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def run_all(cases: Iterable[tuple[str, int]], originals: Path, processes: int) -> Iterator[Outcome]:
    """The outcome of each case, in the order in which they end."""
    todo: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()
    for one in cases:
        todo.put(one)

    def work() -> None:
        worker = Worker(originals)
        while (one := todo.get()) is not None:
            done.put(worker.run(*one))
        worker.stop()
        done.put(None)

    for _ in range(processes):
        todo.put(None)
        threading.Thread(target=work, daemon=True).start()
    left = processes
    while left:
        outcome = done.get()
        if outcome is None:
            left -= 1
        else:
            yield outcome
