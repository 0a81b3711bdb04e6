"""`any4 explain`: which kernel each layer runs on here, and why."""

import argparse
import re
from typing import Any

import jax

from any4_jax.cli.sources import MODEL_HELP, open_model
from any4_jax.matmul import explain
from any4_jax.surgery import quantized_leaves


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "explain", parents=[common], help="which kernel each layer runs on here, and why", allow_abbrev=False
    )
    parser.add_argument("model", metavar="CKPT_OR_MODEL", help=f"a checkpoint, {MODEL_HELP}")
    parser.add_argument("--rows", type=int, default=1, metavar="M", help="rows of the input: 1 is decoding (default)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    model = open_model(args.model)
    leaves = quantized_leaves(model)
    if not leaves:
        print(f"{args.model} has no quantized layers: every product is dense and runs in XLA")
        return 0
    # Layers of the same place in their blocks say the same: they are told together.
    groups: dict[tuple[str, tuple[int, ...], str], int] = {}
    for path, operator in leaves.items():
        x = jax.ShapeDtypeStruct((args.rows, operator.shape[-1]), model.dtype)
        key = (re.sub(r"\b\d+\b", "*", path), tuple(operator.shape), explain(x, operator))
        groups[key] = groups.get(key, 0) + 1
    print(f"platform {jax.default_backend()}, inputs {jax.numpy.dtype(model.dtype).name} [{args.rows}, K]")
    told: dict[str, list[str]] = {}
    for (path, shape, text), count in groups.items():
        told.setdefault(text, []).append(f"{path}  [{' x '.join(map(str, shape))}]  {count} layers")
    for text, places in told.items():
        print("\n" + "\n".join(places))
        print("\n".join(f"    {line}" for line in text.splitlines()))
    return 0
