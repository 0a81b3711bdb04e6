"""`any4 bench`: how fast products, decoding and quantizing are on this machine."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from any4_jax.benchmarks import decode, gemm, machine, quantize, schema
from any4_jax.benchmarks.timing import StreamingRead
from any4_jax.cli.errors import CommandLineError, WorkError
from any4_jax.cli.options import add_fields, build, checked
from any4_jax.cli.output import progress, table
from any4_jax.cli.sources import MODEL_HELP, open_model
from any4_jax.matmul import PLATFORMS
from any4_jax.methods import Any4


def add(commands: Any, common: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """`argv` is the command that results tell how to repeat."""
    parser = commands.add_parser(
        "bench", parents=[common], help="how fast products, decoding and quantizing are here", allow_abbrev=False
    )
    parser.set_defaults(words=["any4", *argv])
    kinds = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    _add_gemm(kinds.add_parser("gemm", parents=[common], help="one product, against dense ones", allow_abbrev=False))
    _add_decode(kinds.add_parser("decode", parents=[common], help="tokens per second", allow_abbrev=False))
    _add_quantize(
        kinds.add_parser("quantize", parents=[common], help="seconds to learn a model's tables", allow_abbrev=False)
    )


def _add_gemm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        type=_shapes,
        default=_shapes("llama-3.2-1b"),
        metavar="NAME|NxK,...",
        help=f"matrices [N, K], or those of a model: {', '.join(gemm.SHAPES)} (default: llama-3.2-1b)",
    )
    parser.add_argument("--m", type=_counts, default=(1, 16), metavar="M,...", help="rows of the input (default: 1,16)")
    parser.add_argument("--bits", type=int, default=4, metavar="B", help="of a code (default: 4)")
    parser.add_argument("--group-size", type=_count, default=128, metavar="G", help="(default: 128)")
    parser.add_argument(
        "--rotate-mb",
        type=_count,
        default=400,
        metavar="MB",
        help="each candidate goes through so much of weights, to read memory and not a cache (default: 400)",
    )
    _add_common(parser, rounds=15)
    parser.set_defaults(run=run_gemm)


def _add_decode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="*",
        default=["tiny"],
        metavar="MODEL",
        help=f"a checkpoint, {MODEL_HELP}; several are timed in turns and told against the first (default: tiny)",
    )
    parser.add_argument("--prompt-tokens", type=_count, default=32, metavar="N", help="(default: 32)")
    parser.add_argument("--tokens", type=_count, default=128, metavar="N", help="new ones, 2 or more (default: 128)")
    _add_common(parser, rounds=5)
    parser.set_defaults(run=run_decode)


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        choices=quantize.LAYERS,
        default="llama-3.1-8b",
        help="the model whose linears' shapes are taken, with random weights (default: llama-3.1-8b)",
    )
    parser.add_argument(
        "--matrices", type=_count, metavar="N", help="time at most N of each shape, reckon the rest (default: all)"
    )
    _add_machine(parser)
    add_fields(parser.add_argument_group("fields of the method any4"), Any4)
    parser.set_defaults(run=run_quantize)


def _add_common(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument(
        "--rounds", type=_count, default=rounds, metavar="N", help=f"turns of each candidate (default: {rounds})"
    )
    _add_machine(parser)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--platform", choices=PLATFORMS, help="refuse to run on any other (default: what jax runs on)")
    parser.add_argument("--out", metavar="FILE", help="write the results here as JSON")


def run_gemm(args: argparse.Namespace) -> int:
    _check(args)
    config = gemm.Gemm(args.shapes, args.m, args.bits, args.group_size, args.rounds, args.rotate_mb)
    with progress("gemm", "shape") as bar:
        measured = gemm.run(config, bar)
    result = machine.result("gemm", args.words, settings=measured.settings, rows=measured.rows, notes=measured.notes)
    print(_heading(result))
    for n, k, m in dict.fromkeys((row["n"], row["k"], row["m"]) for row in result.rows):
        rows = [row for row in result.rows if (row["n"], row["k"], row["m"]) == (n, k, m)]
        print(f"\nN={n}, K={k}, M={m}")
        print(
            table(
                ["product", "dtype", "us", "best us", "times dense float32", "GB/s", "of the stream"],
                [
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
                ],
            )
        )
    print(
        f"\nus: median of {args.rounds} turns, each call waited for "
        f"(one that computes nothing: {result.settings['empty_call_us']:.1f}); times: over the better dense float32"
    )
    return _finish(args, result)


def run_decode(args: argparse.Namespace) -> int:
    _check(args)
    if len(set(args.models)) < len(args.models):
        raise CommandLineError(f"got the models {' '.join(args.models)}, one of them twice; give each once")
    if args.tokens < 2:
        raise CommandLineError(f"got --tokens {args.tokens}, and the first comes from the prompt; give 2 or more")
    contestants = {name: decode.contestant(name, open_model(name)) for name in args.models}
    stream = StreamingRead(machine.platform())
    with progress("decode", "turn") as bar:
        rows = decode.run(
            contestants,
            prompt_tokens=args.prompt_tokens,
            tokens=args.tokens,
            rounds=args.rounds,
            stream=stream,
            progress=bar,
        )
    settings = {"prompt_tokens": args.prompt_tokens, "tokens": args.tokens, "rounds": args.rounds, "batch": 1}
    result = machine.result("decode", args.words, settings=settings | stream.settings(), rows=rows)
    print(_heading(result) + "\n")
    print(decode_table(rows, ("model", "method", "dtype")))
    print(
        f"\n{args.prompt_tokens} prompt tokens, then {args.tokens} new ones, the likeliest each; "
        f"medians of {args.rounds} turns; times: speed over the first"
    )
    return _finish(args, result)


def run_quantize(args: argparse.Namespace) -> int:
    _check(args)
    method = checked(build(Any4, args), True)
    with progress("quantize", "row") as bar:
        rows = quantize.run(quantize.Quantize(args.shape, method, args.matrices), bar)
    total = sum(row["seconds_in_all"] for row in rows)
    settings = {"shape": args.shape, "method": repr(method), "seconds_in_all": total, "peak_gb": quantize.peak_gb()}
    result = machine.result("quantize", args.words, settings=settings, rows=rows)
    print(f"{result.device.name}, {result.device.platform}, {result.device.cores} cores\n")
    header = ("n", "k", "matrices", "measured", "compile_s", "seconds_per_matrix", "rows_per_s", "seconds_in_all")
    print(table(header, [[f"{row[name]:g}" for name in header] for row in rows]))
    print(f"\n{sum(row['matrices'] for row in rows)} linears in {total:.1f} s, at most {settings['peak_gb']:.1f} GB")
    return _finish(args, result)


def decode_table(rows: Sequence[Any], facts: Sequence[str]) -> str:
    """The rows of `decode.run`, with some of the contestants' facts."""
    return table(
        [*facts, "MB/token", "prefill ms", "tokens/s", "best", "ms/token", "times", "GB/s", "of the stream"],
        [
            [
                *(str(row[fact]) for fact in facts),
                f"{row['read_mb_per_token']:.1f}",
                f"{row['prefill_ms']:.1f}",
                f"{row['decode_tokens_per_s']:.1f}",
                f"{row['best_decode_tokens_per_s']:.1f}",
                f"{row['decode_ms_per_token']:.2f}",
                f"{row['speed_ratio_to_first']:.2f}",
                f"{row['gb_per_s']:.2f}",
                f"{row['share_of_streaming_read']:.0%}",
            ]
            for row in rows
        ],
    )


def _check(args: argparse.Namespace) -> None:
    """Refuses before the work what would fail after it."""
    if args.out is not None and not Path(args.out).absolute().parent.is_dir():
        raise WorkError(f"{args.out} can't be written, its folder is missing; make it first")
    here = machine.platform()
    if args.platform not in (None, here):
        raise CommandLineError(
            f"got --platform {args.platform}, and jax runs on {here} here; set JAX_PLATFORMS={args.platform} "
            "where jax has it, or leave --platform out"
        )


def _microseconds(value: float) -> str:
    return f"{value:.{1 if value < 1000 else 0}f}"


def _heading(result: schema.Result) -> str:
    device, stream = result.device, result.settings
    return (
        f"{device.name}, {device.platform}, {device.cores} cores; reads {stream['stream_gb_per_s']:.2f} GB/s "
        f"({stream['stream_way']})"
    )


def _finish(args: argparse.Namespace, result: schema.Result) -> int:
    for note in result.notes:
        print(f"note: {note}")
    if args.out is not None:
        schema.write(args.out, result)
        print(f"wrote {args.out}")
    return 0


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    shapes: list[tuple[int, int]] = []
    for name in text.split(","):
        if name in gemm.SHAPES:
            shapes += gemm.SHAPES[name]
            continue
        sizes = name.split("x")
        if len(sizes) != 2 or not all(size.isdigit() and int(size) > 0 for size in sizes):
            raise argparse.ArgumentTypeError(f"got {name!r}, need NxK or one of {', '.join(gemm.SHAPES)}")
        shapes.append((int(sizes[0]), int(sizes[1])))
    return tuple(dict.fromkeys(shapes))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_count(part) for part in text.split(",")))


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, need a whole number above 0")
    return int(text)
