"""Seconds and memory that training takes at a model's shape: of one block, and of a step of all of them end to end.

    python examples/benchmarks/tune_cost.py --shape llama-3.1-8b --out tune_cost.json

Weights are random bfloat16, and codes and tables of any4 random too: cost doesn't depend on the values. The block is
trained from int4's codes, with rounding, as `Tune` does it; the second of two runs is timed, which compiles nothing,
and a model takes as many times that as it has blocks. Of the steps of `any4_jax.tune` the fastest is told: held-out
rows are looked at between some of them. "first_s" is the first run or step, compiling included. Peak memory is that of
the process so far, on its device if that tells it, with the models.
"""

import argparse
import dataclasses
import sys
import time

import jax
import numpy as np

import any4_jax as a4
from any4_jax import benchmarks
from any4_jax.benchmarks.quantize import peak_gb
from any4_jax.benchmarks.shapes import CONFIGS, METHODS, random_model
from any4_jax.cli.numbers import at_least
from any4_jax.methods import Int, Tune
from any4_jax.surgery import quantized_leaves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=CONFIGS, default="llama-3.1-8b")
    parser.add_argument("--rows", type=at_least(2), default=128, help="rows of tokens for the block (default: 128)")
    parser.add_argument("--seqlen", type=at_least(2), default=2048, help="tokens in a row (default: 2048)")
    parser.add_argument("--batch", type=at_least(1), default=8, help="rows in a step (default: 8)")
    parser.add_argument("--block-steps", type=at_least(1), default=200, help="steps of the block (default: 200)")
    parser.add_argument("--steps", type=at_least(2), default=16, help="steps end to end (default: 16)")
    parser.add_argument("--only", choices=("block", "model"), help="one of the two")
    parser.add_argument("--out", metavar="FILE", help="write the results here as JSON")
    args = parser.parse_args()
    rows = []
    if args.only != "block":
        rows.append(_model(args))
    if args.only != "model":
        rows.append(_block(args))
    for row in rows:
        print("  ".join(f"{key} {v:.2f}" if isinstance(v, float) else f"{key} {v}" for key, v in row.items()))
    if args.out:
        settings = {name: value for name, value in vars(args).items() if name not in ("out", "only")}
        command = ["python", *sys.argv]
        benchmarks.write(args.out, benchmarks.result("tune_cost", command, settings=settings, rows=rows))


def _tokens(args: argparse.Namespace, rows: int) -> np.ndarray:
    vocabulary = CONFIGS[args.shape].vocab_size
    return np.random.default_rng(0).integers(0, vocabulary, (rows, args.seqlen), dtype=np.int32)


def _model(args: argparse.Namespace) -> dict[str, float | str]:
    """A step end to end, with as few rows as there can be: what is held out is a batch of its own."""
    begun, ends = time.perf_counter(), list[float]()
    model, teacher = random_model(args.shape, METHODS["any4"]), random_model(args.shape)
    a4.tune(
        model,
        teacher,
        _tokens(args, 2 * args.batch),
        steps=args.steps,
        batch_size=args.batch,
        seqlen=args.seqlen,
        held_out=0.5,
        progress=lambda *_: ends.append(time.perf_counter()),
    )
    return {
        "trained": "a step end to end",
        "s": float(np.diff(ends).min()),
        "first_s": ends[0] - begun,
        "peak_gb": peak_gb(),
    }


def _block(args: argparse.Namespace) -> dict[str, float | str]:
    """A model of one block."""
    CONFIGS["one block"] = dataclasses.replace(CONFIGS[args.shape], num_hidden_layers=1)
    model, method = random_model("one block"), Tune(Int(), steps=args.block_steps, batch=args.batch, rounding=True)
    data, taken = _tokens(args, args.rows), list[float]()
    for _ in range(2):
        begun = time.perf_counter()
        made = a4.quantize_model(model, method, data=data, batch_size=args.batch, seqlen=args.seqlen)
        jax.block_until_ready(quantized_leaves(made))
        taken.append(time.perf_counter() - begun)
    return {"trained": "a block", "s": taken[1], "first_s": taken[0], "peak_gb": peak_gb()}


if __name__ == "__main__":
    main()
