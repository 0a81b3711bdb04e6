"""Seconds to learn the tables of one matrix, compared with scikit-learn's KMeans on the same rows.

    python examples/benchmarks/solver.py --out examples/benchmarks/results/solver.json

Each row has K normal values, with weights. scikit-learn is timed on a few rows, with its own threads and called as in
the original any4 (k-means++, one start). Our solvers are timed on all rows, after compiling; the last is the default
recipe, which also refits table, scales and offsets. The growth of peak memory, relative to the bytes of the matrix, is
what a solver adds to the peak of all that ran before it in the process.
"""

import argparse
import resource
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.cluster import KMeans

from any4_jax import benchmarks, methods

ENTRIES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("N", "K"))
    parser.add_argument("--group-size", type=int, default=128, metavar="G")
    parser.add_argument("--sample", type=int, default=32, help="rows on which scikit-learn is timed")
    parser.add_argument("--out", help="write the results here as JSON")
    args = parser.parse_args()
    n, k = args.shape
    w = np.random.default_rng(0).standard_normal((n, k)).astype(np.float32)

    rows = [
        {
            "solver": "scikit-learn",
            "ms_per_row": 1e3 * _sklearn(w[: args.sample]),
            "compile_s": 0.0,
            "peak_growth_ratio": None,
        }
    ]
    learners = {
        "lloyd": methods.Any4(group_size=args.group_size, solver="lloyd", refit=False),
        "exact": methods.Any4(group_size=args.group_size, refit=False),
        "exact, refit": methods.Any4(group_size=args.group_size),
    }
    for name, method in learners.items():
        rows.append({"solver": name} | _ours(w, method))
    for row in rows:
        row["seconds_per_matrix"] = row["ms_per_row"] * n / 1e3
        print("  ".join(f"{key} {v:.2f}" if isinstance(v, float) else f"{v or '':<12}" for key, v in row.items()))
    if args.out:
        settings = {"n": n, "k": k, "group_size": args.group_size, "sampled_rows": args.sample}
        command = ["python", *sys.argv]
        benchmarks.write(
            args.out, benchmarks.result("solver", command, settings=settings, rows=rows, packages=["scikit-learn"])
        )


def _sklearn(rows: np.ndarray) -> float:
    """Seconds per row in one process."""
    weight = np.ones(rows.shape[1])
    begin = time.perf_counter()
    for row in rows:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            KMeans(ENTRIES, random_state=0, n_init=1).fit(row[:, None], sample_weight=weight)
    return (time.perf_counter() - begin) / len(rows)


def _ours(w: np.ndarray, method: methods.Any4) -> dict[str, float]:
    """The figures of all of `quantize`: scales, tables, codes, packing."""
    array = jnp.asarray(w)
    seconds = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        begin = time.perf_counter()
        jax.block_until_ready(methods.quantize(array, method))
        seconds.append(time.perf_counter() - begin)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / w.nbytes
    first, second = seconds
    return {"ms_per_row": 1e3 * second / len(w), "compile_s": first - second, "peak_growth_ratio": grown}


if __name__ == "__main__":
    main()
