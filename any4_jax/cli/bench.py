"""`any4 bench`: how fast products, decoding and quantizing are on this machine."""

import argparse
from collections.abc import Sequence
from typing import Any

from any4_jax.benchmarks import decode, machine, quantize, shapes
from any4_jax.benchmarks.timing import StreamingRead
from any4_jax.cli.bench_gemm import add_gemm
from any4_jax.cli.bench_shared import add_common, add_machine, check, finish, heading
from any4_jax.cli.errors import CommandLineError
from any4_jax.cli.methods import add_method, method_from
from any4_jax.cli.numbers import at_least, count
from any4_jax.cli.options import checked
from any4_jax.cli.output import progress, table
from any4_jax.cli.sources import MODEL_HELP, open_model
from any4_jax.models.base import Decoder


def add(commands: Any, common: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Adds the command; `argv` is its command line, which results record so that they can be repeated."""
    parser = commands.add_parser(
        "bench", parents=[common], help="how fast products, decoding and quantizing are here", allow_abbrev=False
    )
    parser.set_defaults(words=["any4", *argv])
    kinds = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    add_gemm(kinds.add_parser("gemm", parents=[common], help="one product, against dense ones", allow_abbrev=False))
    _add_decode(kinds.add_parser("decode", parents=[common], help="tokens per second", allow_abbrev=False))
    _add_quantize(
        kinds.add_parser(
            "quantize", parents=[common], help="seconds to quantize a model's linears", allow_abbrev=False
        ),
        argv,
    )


def _add_decode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="*",
        default=[],
        metavar="MODEL",
        help=f"a checkpoint, {MODEL_HELP}; several are timed in turns and compared with the first (default: tiny)",
    )
    parser.add_argument(
        "--shape",
        choices=shapes.CONFIGS,
        help="time a model of this shape with random weights instead: in bfloat16, and with 4-bit linears",
    )
    parser.add_argument("--prompt-tokens", type=count, default=32, metavar="N", help="(default: 32)")
    parser.add_argument(
        "--tokens", type=at_least(2), default=128, metavar="N", help="new tokens, 2 or more (default: 128)"
    )
    add_common(parser, rounds=5)
    parser.set_defaults(run=run_decode)


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


def run_decode(args: argparse.Namespace) -> int:
    check(args)
    if len(set(args.models)) < len(args.models):
        raise CommandLineError(f"got the models {' '.join(args.models)}, some more than once; give each once")
    if args.shape is not None and args.models:
        raise CommandLineError(f"got --shape and the model {args.models[0]}; give one or the other")
    models = _of_shape(args.shape) if args.shape else {name: open_model(name) for name in args.models or ["tiny"]}
    contestants = {name: decode.contestant(args.shape or name, model) for name, model in models.items()}
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
    print(heading(result) + "\n")
    print(decode_table(rows, ("model", "method", "dtype")))
    print(
        f"\n{args.prompt_tokens} prompt tokens, then {args.tokens} new ones, the likeliest each; "
        f"medians of {args.rounds} turns; times: speed over the first"
    )
    return finish(args, result)


def _of_shape(shape: str) -> dict[str, Decoder]:
    dense = shapes.dense(shape)
    return {"bfloat16": dense, "4 bits": shapes.few_bits(dense, group_size=128)}


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


def decode_table(rows: Sequence[Any], facts: Sequence[str]) -> str:
    """A table of the rows of `decode.run`, with these facts of the contestants."""
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
