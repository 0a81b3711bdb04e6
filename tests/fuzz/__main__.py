"""Runs many cases, or chosen ones: `python -m fuzz --cases 2000 --first 200`, `python -m fuzz gguf:17`."""

from __future__ import annotations

import argparse
import collections
import os
import sys
import tempfile
from pathlib import Path


def main() -> int:
    """Prints each finding; the exit code is 1 if there is one."""
    parser = argparse.ArgumentParser(prog="fuzz", description="Mutated inputs: each a result or one sentence.")
    parser.add_argument("chosen", nargs="*", metavar="KIND:NUMBER", help="these cases alone, all printed")
    parser.add_argument("--cases", type=int, default=2000, help="how many, of all kinds in turn (default: 2000)")
    parser.add_argument("--first", type=int, default=0, help="the first number of each kind (default: 0)")
    parser.add_argument("--kinds", nargs="+", help="only these kinds")
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--all", action="store_true", help="print every case")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    from fuzz.cases import KINDS
    from fuzz.originals import write_all
    from fuzz.pool import run_all

    kinds = args.kinds or list(KINDS)
    if args.chosen:
        cases = [(kind, int(number)) for kind, _, number in (one.partition(":") for one in args.chosen)]
    else:
        cases = [(kinds[i % len(kinds)], args.first + i // len(kinds)) for i in range(args.cases)]
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        originals = Path(folder, "originals")
        write_all(originals)
        for outcome in run_all(cases, originals, min(args.processes, len(cases))):
            counts[outcome.kind, outcome.verdict] += 1
            if args.chosen or args.all or outcome.verdict == "finding":
                print(outcome, flush=True)
    for kind in sorted({kind for kind, _ in counts}):
        print(
            f"{kind}: "
            + ", ".join(f"{counts[kind, verdict]} {verdict}" for verdict in ("result", "refused", "finding"))
        )
    return int(any(verdict == "finding" for _, verdict in counts))


if __name__ == "__main__":
    sys.exit(main())
