"""`any4 bench gemm --tune`: rows for pallas_kernels/tuned.json."""

import argparse
import json

from any4_jax.benchmarks import files, tune
from any4_jax.cli.errors import WorkError
from any4_jax.cli.output import tell


def run_tune(args: argparse.Namespace, shapes: tuple[tuple[int, int], ...], counts: tuple[int, ...]) -> int:
    """Prints each row as it is found; with --out, also writes all rows as a JSON list, the form of tuned.json."""
    rows = []
    try:
        for row in tune.run(shapes, counts, args.bits, args.group_size):
            print(json.dumps(row), flush=True)
            rows.append(row)
    except RuntimeError as error:
        raise WorkError(str(error)) from error
    tell(lambda: {"rows": rows})
    if args.out is not None:
        text = ",\n".join(json.dumps(row) for row in rows)
        files.write_whole(args.out, f"[\n{text}\n]\n")
        print(f"wrote {args.out}")
    return 0
