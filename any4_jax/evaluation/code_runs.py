"""Code that a model wrote, judged by running it: a process each, with limits and without a network."""

import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from any4_jax.evaluation import confined

SECONDS = 5
BYTES = 2**30
# Exit codes that no program of itself ends with; which of them is right is drawn anew for each.
_CODES = range(64, confined.REFUSED)


def passes(program: str, *, seconds: int = SECONDS, size: int = BYTES) -> bool:
    """Whether a Python program runs to its end without an error.

    It runs in an empty folder, in a process of its own without a network, for at most `seconds`, with at most `size`
    bytes of memory and files of at most 1 MiB. It may read what this user may read.

    Args:
      program: its text: the code, and the tests that it has to pass.
      seconds, size: the limits.

    Raises:
      OSError: the system allows no process without a network.
    """
    code = random.SystemRandom().choice(_CODES)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.py"
        # A program that ends before its tests doesn't know the code.
        file.write_text(f"{program}\nraise SystemExit({code})\n", encoding="utf-8", errors="replace")
        command = [sys.executable, "-I", confined.__file__, str(seconds), str(size), str(file)]
        silent: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        process = subprocess.Popen(command, cwd=folder, env={}, start_new_session=True, **silent)
        try:
            ended = process.wait(seconds)
        except subprocess.TimeoutExpired:
            ended = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if ended == confined.REFUSED:
        raise OSError(
            "generated code runs in a process without a network, which this system doesn't allow; run on Linux with "
            "user namespaces"
        )
    return ended == code


def pass_at_k(
    references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100)
) -> tuple[dict[str, float], list[list[bool]]]:
    """The share of problems that one of k programs solves, "pass@k" for each k, by the unbiased estimator of
    "Evaluating Large Language Models Trained on Code" (arXiv:2107.03374); and which programs passed.

    Args:
      references: the tests of each problem.
      predictions: programs for each problem.
      k: numbers of programs; those that exceed what a problem has are left out.

    Raises:
      OSError: see `passes`.
    """
    programs = [
        [f"{program}\n{tests}" for program in written] for tests, written in zip(references, predictions, strict=True)
    ]
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        results = [list(pool.map(passes, each)) for each in programs]
    fewest = min(map(len, results), default=0)
    found = {
        f"pass@{n}": sum(_one_of(n, len(each), sum(each)) for each in results) / len(results) for n in k if n <= fewest
    }
    return found, results


def _one_of(k: int, n: int, right: int) -> float:
    """The probability that k of n programs, of which so many are right, hold a right one."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
