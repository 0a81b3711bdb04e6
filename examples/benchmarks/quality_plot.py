"""Draws how far quantized models are from the float one against their size, from files that ablations.py wrote.

    python examples/benchmarks/ablations.py --only bits-kl --text FILE --calibration-text FILE --out bits_kl.json
    python examples/benchmarks/quality_plot.py bits_kl.json bits_kl.svg

Several files, of one model on the same windows, are drawn as one. The KL from the float model is on a logarithmic axis,
bits per weight are those of the arrays as stored. Each method has a line, whose points are its group sizes; rows above
2 nats are left out. A table has one colour: solid with GPTQ's codes, dashed and hollow with the nearest ones.
"""

import argparse
import sys
from pathlib import Path

from any4_jax import benchmarks
from any4_jax.benchmarks.files import write_whole
from any4_jax.benchmarks.plot import quality_plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json", help="what ablations.py --out wrote")
    parser.add_argument("out", type=Path, metavar="OUT.svg", help="the drawing")
    parser.add_argument("--study", default="bits-kl", help="the study to draw (default: bits-kl)")
    args = parser.parse_args()

    try:
        results = [benchmarks.read(path) for path in args.results]
        others = [
            str(path) for path, result in zip(args.results, results, strict=True) if result.benchmark != "ablations"
        ]
        if others:
            sys.exit(f"got {', '.join(others)} of other benchmarks, need what ablations.py wrote; leave them out")
        titles = dict.fromkeys(
            "{model}: KL on {text}, {windows} windows of {seqlen}".format_map(result.settings) for result in results
        )
        if len(titles) > 1:
            sys.exit(f"got files of {' and of '.join(titles)}, need the same model and windows; draw them apart")
        rows = [row for result in results for row in result.rows if row["study"] == args.study]
        write_whole(args.out, quality_plot(rows, *titles))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
