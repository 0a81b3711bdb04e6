"""A process that runs cases. It reads "kind number" from stdin and answers with one line of JSON."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

SLACK = 2**26
"""Bytes that a case may take beside twice its files: compiled programs, opened libraries."""
ADDRESSES = 2**31
"""Bytes that the process may reserve more than it does after its first case."""


def main() -> None:
    """Runs cases until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    # What commands and libraries print is no answer.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TQDM_DISABLE="1")
    warnings.simplefilter("ignore")
    from fuzz.cases import case
    from fuzz.judge import judged, load_and_run

    originals = Path(sys.argv[1])
    load_and_run(originals / "folders" / "llama", True, originals)
    limit = _memory("VmSize") + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin:
        kind, number = line.split()
        folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=originals.parent))
        try:
            one = case(kind, int(number), originals, folder)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            before = _reset()
            verdict, words = judged(one)
            grown = _memory("VmHWM") - before
            # A command that runs a model has good reasons for more.
            if (verdict == "refused" or verdict == "result" and kind != "cli") and grown > 2 * size + SLACK:
                verdict, words = "finding", f"took {grown} bytes of memory, and its files have {size}; {words}"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        answers.write(json.dumps([verdict, one.words, words]) + "\n")
        answers.flush()


def _memory(name: str) -> int:
    """Bytes of memory, as Linux counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {name}")


def _reset() -> int:
    """Makes the peak begin anew; returns the bytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmHWM")


if __name__ == "__main__":
    main()
