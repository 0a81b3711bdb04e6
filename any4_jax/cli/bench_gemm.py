"""`any4 bench gemm`: one product, with quantized weights and with dense ones."""

import argparse
from collections.abc import Sequence
from typing import Any

from any4_jax.benchmarks import gemm, gemm_cuda, machine
from any4_jax.benchmarks.plot import speed_plot
from any4_jax.cli.bench_shared import add_common, check, counts, finish, heading
from any4_jax.cli.bench_tune import run_tune
from any4_jax.cli.errors import CommandLineError
from any4_jax.cli.numbers import count
from any4_jax.cli.output import progress, table
from any4_jax.cli.sources import add_inputs
from any4_jax.packing import PLANES

ON_CUDA = "llama-3.2-1b-together,llama-3.1-8b-together,llama-3.1-70b-together,squares"


def add_gemm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        type=_shapes,
        metavar="NAME|NxK,...",
        help=f"matrices [N, K], or those of a model: {', '.join(gemm.SHAPES)} (default: llama-3.2-1b; on cuda those "
        "whose names end in -together, and squares)",
    )
    parser.add_argument(
        "--m", type=counts, metavar="M,...", help="rows of the input (default: 1,16; on cuda 1 to 2048)"
    )
    parser.add_argument(
        "--bits", type=int, choices=sorted(PLANES), default=4, metavar="B", help="of a code (default: 4)"
    )
    parser.add_argument("--group-size", type=count, default=128, metavar="G", help="(default: 128)")
    parser.add_argument(
        "--rotate-mb",
        type=count,
        default=400,
        metavar="MB",
        help="each candidate cycles through this much of weights, so that it reads memory, not a cache (default: 400)",
    )
    add_inputs(parser, "on a CPU: also time a weight whose")
    parser.add_argument(
        "--binary", action="store_true", help="also time a sum of as many binary planes, a BCQ's weight"
    )
    parser.add_argument(
        "--outliers", action="store_true", help="also time SpQR's weight: 3 bits, coded scales, a hundredth of outliers"
    )
    parser.add_argument("--plot", metavar="FILE.svg", help="on cuda: plot the speed against the number of rows here")
    parser.add_argument(
        "--tune", action="store_true", help="find the fastest configuration of the Pallas kernels here instead"
    )
    add_common(parser, rounds=15)
    parser.set_defaults(run=run_gemm)


def run_gemm(args: argparse.Namespace) -> int:
    check(args, args.plot)
    if args.tune and args.plot is not None:
        raise CommandLineError("got --tune and --plot, and tuning measures nothing that is drawn; leave one out")
    if args.tune:
        return run_tune(args, args.shapes or _shapes("llama-3.1-8b"), args.m or (1, 16))
    on_cuda = machine.platform() == "cuda"
    if args.plot is not None and not on_cuda:
        raise CommandLineError("got --plot, which draws what is measured on cuda; run on a GPU, or leave it out")
    if args.inputs is not None and on_cuda:
        raise CommandLineError("got --inputs, which is measured on a CPU alone; leave it out, or set JAX_PLATFORMS=cpu")
    shapes = args.shapes or _shapes(ON_CUDA if on_cuda else "llama-3.2-1b")
    rows = args.m or (gemm_cuda.ROWS if on_cuda else (1, 16))
    config = gemm.Gemm(
        *(shapes, rows, args.bits, args.group_size, args.rounds, args.rotate_mb),
        *(args.inputs is not None, args.binary, args.outliers),
    )
    with progress("gemm", "shape") as bar:
        measured = (gemm_cuda.run if on_cuda else gemm.run)(config, bar)
    result = machine.result(
        "gemm",
        args.words,
        settings=measured.settings,
        rows=measured.rows,
        notes=measured.notes,
        packages=["torch"] if on_cuda else (),
    )
    print(heading(result))
    for n, k, m in dict.fromkeys((row["n"], row["k"], row["m"]) for row in result.rows):
        rows = [row for row in result.rows if (row["n"], row["k"], row["m"]) == (n, k, m)]
        print(f"\nN={n}, K={k}, M={m}")
        print(table(*(_cuda_table(rows) if on_cuda else _cpu_table(rows))))
    if on_cuda:
        print(
            f"\nus: median of {args.rounds} turns in a compiled loop or a captured graph; call us: called from Python, "
            "one after the other; times: over cuBLAS"
        )
    else:
        print(
            f"\nus: median of {args.rounds} turns, each call waited for "
            f"(one that computes nothing: {result.settings['empty_call_us']:.1f}); times: over the better dense float32"
        )

    def draw() -> str:
        ratio, beside = ("cublas", "cuBLAS") if result.rows[0]["speed_ratio_to_cublas"] else ("xla", "XLA's")
        product = result.rows[0]["product"]
        title = f"{result.device.name}: {product}, times the speed of {beside} bfloat16"
        return speed_plot(result.rows, product, f"speed_ratio_to_{ratio}", title)

    return finish(args, result, args.plot, draw)


def _cpu_table(rows: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
    header = ["product", "dtype", "us", "best us", "times dense float32", "GB/s", "of the stream"]
    return header, [
        [
            row["product"],
            row["dtype"],
            _microseconds(row["us"]),
            _microseconds(row["best_us"]),
            f"{row['speed_ratio_to_dense_float32']:.2f}",
            f"{row['gb_per_s']:.2f}",
            f"{row['share_of_streaming_read']:.0%}",
        ]
        for row in rows
    ]


def _cuda_table(rows: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
    header = ["product", "us", "call us", "times", "GB/s", "of the stream"]
    return header, [
        [
            row["product"],
            _microseconds(row["us"]),
            "" if row["call_us"] is None else _microseconds(row["call_us"]),
            "" if row["speed_ratio_to_cublas"] is None else f"{row['speed_ratio_to_cublas']:.2f}",
            f"{row['gb_per_s']:.0f}",
            f"{row['share_of_streaming_read']:.0%}",
        ]
        for row in rows
    ]


def _microseconds(value: float) -> str:
    return f"{value:.{1 if value < 1000 else 0}f}"


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    shapes: list[tuple[int, int]] = []
    for name in text.split(","):
        if name in gemm.SHAPES:
            shapes += gemm.SHAPES[name]
            continue
        sizes = name.split("x")
        if len(sizes) != 2 or not all(size.isdecimal() and 0 < int(size) < 2**31 for size in sizes):
            raise argparse.ArgumentTypeError(f"got {name!r}, need NxK or one of {', '.join(gemm.SHAPES)}")
        shapes.append((int(sizes[0]), int(sizes[1])))
    return tuple(dict.fromkeys(shapes))
