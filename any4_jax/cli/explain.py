"""`any4 explain`: which kernel each linear runs on here, and why."""

import argparse
from typing import Any

from any4_jax.cli.numbers import count
from any4_jax.cli.output import tell
from any4_jax.cli.sources import MODEL_HELP, open_any
from any4_jax.surgery import explained


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "explain", parents=[common], help="which kernel each linear runs on here, and why", allow_abbrev=False
    )
    parser.add_argument("model", metavar="CKPT_OR_MODEL", help=f"a checkpoint, {MODEL_HELP}")
    parser.add_argument("--rows", type=count, default=1, metavar="M", help="rows of the input; 1 is decoding (default)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    found = explained(open_any(args.model), rows=args.rows)
    print(found)
    tell(
        lambda: {
            "model": args.model,
            "rows": args.rows,
            "platform": found.platform,
            "groups": [
                {"layers": [{"path": path, "count": count} for path, count in places.items()]}
                | {"backends": text.splitlines()}
                for text, places in found.layers.items()
            ],
        }
    )
    return 0
