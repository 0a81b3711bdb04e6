"""`any4 bench`: how fast products, decoding and quantizing are on this machine."""

import argparse
from collections.abc import Sequence
from typing import Any

from any4_jax.benchmarks import machine, quantize
from any4_jax.cli.bench_cache import add_cache
from any4_jax.cli.bench_decode import add_decode
from any4_jax.cli.bench_gemm import add_gemm
from any4_jax.cli.bench_report import add_report
from any4_jax.cli.bench_shared import add_machine, check, finish
from any4_jax.cli.methods import add_method, method_from
from any4_jax.cli.numbers import count
from any4_jax.cli.options import checked
from any4_jax.cli.output import progress, table


def add(commands: Any, common: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Adds the command; `argv` is its command line, which results record so that they can be repeated."""
    parser = commands.add_parser(
        "bench", parents=[common], help="how fast products, decoding and quantizing are here", allow_abbrev=False
    )
    parser.set_defaults(words=["any4", *argv])
    kinds = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    add_gemm(kinds.add_parser("gemm", parents=[common], help="one product, against dense ones", allow_abbrev=False))
    add_decode(kinds.add_parser("decode", parents=[common], help="tokens per second", allow_abbrev=False))
    add_cache(
        kinds.add_parser("cache", parents=[common], help="a step against the context, by cache", allow_abbrev=False)
    )
    add_report(
        kinds.add_parser("report", parents=[common], help="recorded results as a page of drawings", allow_abbrev=False)
    )
    _add_quantize(
        kinds.add_parser(
            "quantize", parents=[common], help="seconds to quantize a model's linears", allow_abbrev=False
        ),
        argv,
    )


def _add_quantize(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument(
        "--shape",
        choices=quantize.BLOCKS,
        default="llama-3.1-8b",
        help="the model whose linears give the shapes; weights are random (default: llama-3.1-8b)",
    )
    parser.add_argument(
        "--matrices",
        type=count,
        metavar="N",
        help="time at most N of each shape and extrapolate to the rest (default: all)",
    )
    add_machine(parser)
    add_method(parser, argv)
    parser.set_defaults(run=run_quantize)


def run_quantize(args: argparse.Namespace) -> int:
    check(args)
    method = checked(method_from(args), True)
    with progress("quantize", "row") as bar:
        rows = quantize.run(quantize.Quantize(args.shape, method, args.matrices), bar)
    total = sum(row["seconds_in_all"] for row in rows)
    settings = {"shape": args.shape, "method": repr(method), "seconds_in_all": total, "peak_gb": quantize.peak_gb()}
    result = machine.result("quantize", args.words, settings=settings, rows=rows)
    print(f"{result.device.name}, {result.device.platform}, {result.device.cores} cores\n")
    header = ("n", "k", "matrices", "measured", "compile_s", "seconds_per_matrix", "rows_per_s", "seconds_in_all")
    print(table(header, [[f"{row[name]:g}" for name in header] for row in rows]))
    print(f"\n{sum(row['matrices'] for row in rows)} linears in {total:.1f} s, at most {settings['peak_gb']:.1f} GB")
    return finish(args, result)
