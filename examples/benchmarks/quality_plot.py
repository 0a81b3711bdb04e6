"""Draws how far quantized models are from the float one against their size, from a file that ablations.py wrote.

    python examples/benchmarks/ablations.py --only bits-kl --text FILE --calibration-text FILE --out bits_kl.json
    python examples/benchmarks/quality_plot.py bits_kl.json bits_kl.svg

The KL from the float model is on a logarithmic axis, bits per weight are those of the arrays as stored. Each method has
a line, whose points are its group sizes.
"""

import argparse
import sys
from pathlib import Path

from any4_jax import benchmarks
from any4_jax.benchmarks.plot import quality_plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, metavar="RESULT.json", help="what ablations.py --out wrote")
    parser.add_argument("out", type=Path, metavar="OUT.svg", help="the drawing")
    parser.add_argument("--study", default="bits-kl", help="the study to draw (default: bits-kl)")
    args = parser.parse_args()

    try:
        result = benchmarks.read(args.result)
        rows = [row for row in result.rows if row.get("study") == args.study and row.get("kl_nats") is not None]
        settings = result.settings
        title = f"{settings['model']}: KL on {settings['text']}, {settings['windows']} windows of {settings['seqlen']}"
        args.out.write_text(quality_plot(rows, title), encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(f"{error}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
