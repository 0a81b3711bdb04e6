"""`any4 bench decode`: tokens per second of models, after prompts of several lengths."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from any4_jax.benchmarks import contestants, decode, machine, profile, shapes
from any4_jax.benchmarks.plot import decode_plot
from any4_jax.benchmarks.timing import StreamingRead
from any4_jax.cli.bench_shared import add_common, check, counts, finish, heading
from any4_jax.cli.errors import CommandLineError, WorkError
from any4_jax.cli.numbers import at_least
from any4_jax.cli.output import progress, table
from any4_jax.cli.sources import MODEL_HELP, add_inputs, open_model

FACTS = ("model", "method", "head", "dtype")
# Of the memory that is free, for weights; the rest is for caches and what the programs compute.
FOR_WEIGHTS = 0.8


def add_decode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="*",
        default=[],
        metavar="MODEL",
        help=f"a checkpoint, {MODEL_HELP}; several are timed in turns and compared with the first (default: tiny)",
    )
    parser.add_argument(
        "--shape", choices=shapes.CONFIGS, help="time models of this shape with random weights instead, in bfloat16"
    )
    names = ", ".join(shapes.METHODS)
    parser.add_argument(
        "--methods",
        type=_methods,
        metavar="METHOD,...",
        help=f"with --shape: how weights are stored, of {names} (default: bfloat16,any4)",
    )
    parser.add_argument(
        "--head",
        choices=shapes.METHODS,
        help="with --shape: how the head of the models with few bits is stored; one that is tied to the embedding is "
        "the embedding too (default: bfloat16)",
    )
    parser.add_argument(
        "--contexts", type=counts, default=(32,), metavar="N,...", help="tokens of the prompt (default: 32)"
    )
    parser.add_argument(
        "--batch", type=counts, default=(1,), metavar="B,...", help="rows that are decoded together (default: 1)"
    )
    parser.add_argument(
        "--tokens", type=at_least(2), default=128, metavar="N", help="new tokens of a row, 2 or more (default: 128)"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="on a GPU: let each decode once more under jax's profiler, and tell the time by class of kernel",
    )
    add_inputs(parser, "time each model twice, also while its")
    parser.add_argument("--svg", metavar="FILE", help="plot the speed against the tokens of the prompt here")
    add_common(parser, rounds=5)
    parser.set_defaults(run=run_decode)


def run_decode(args: argparse.Namespace) -> int:
    check(args, args.svg)
    if len(set(map(os.path.realpath, args.models))) < len(args.models):
        raise CommandLineError(f"got the models {' '.join(args.models)}, some more than once; give each once")
    if args.shape is not None and args.models:
        raise CommandLineError(f"got --shape and the model {args.models[0]}; give one or the other")
    for flag, value in (("--methods", args.methods), ("--head", args.head)):
        if args.shape is None and value is not None:
            raise CommandLineError(f"got {flag} without --shape, whose weights it describes; give --shape too")
    if args.shape is not None and args.inputs is not None:
        raise CommandLineError(
            "got --inputs with --shape, whose weights have no kernel for rounded inputs; give a model"
        )
    few = [name for name in args.methods or () if shapes.METHODS[name] is not None]
    if args.head is not None and args.methods is not None and not few:
        raise CommandLineError(
            f"got --head {args.head} and no method with few bits, whose head it describes; add one to --methods, or "
            "leave --head out"
        )
    if args.profile and machine.platform() not in profile.PLATFORMS:
        raise CommandLineError(
            f"got --profile, which tells kernels of a GPU apart, and jax runs on {machine.platform()} here; leave it "
            "out, or run on a GPU"
        )
    entries = _entries(args)
    stream = StreamingRead(machine.platform())
    free = machine.available_bytes()
    config = decode.Decode(args.contexts, args.batch, args.tokens, args.rounds, args.profile)
    with progress("decode", "turn") as bar:
        rows, notes = decode.run(
            entries, config, stream=stream, room=None if free is None else int(FOR_WEIGHTS * free), progress=bar
        )
    if not rows:
        raise WorkError(f"nothing could be measured: {'; '.join(notes)}")
    settings = {"tokens": args.tokens, "rounds": args.rounds} | stream.settings()
    result = machine.result("decode", args.words, settings=settings, rows=rows, notes=notes)
    print(heading(result) + "\n")
    print(decode_table(rows, FACTS))
    print(
        f"\nafter a prompt, {args.tokens} new tokens a row, the likeliest each; medians of {args.rounds} turns; times: "
        "speed over the first; GB: the most that the process had held"
    )
    if args.profile:
        print("\n" + profile_table(rows, FACTS))
        print("\nms a token (launches a token); gaps: the time of a step without the profiler, less its kernels'")
    title = f"{result.device.name}: decoding, {', '.join(dict.fromkeys(row['model'] for row in rows))}"
    return finish(args, result, args.svg, lambda: decode_plot(rows, title))


def _entries(args: argparse.Namespace) -> dict[str, contestants.Entry]:
    if args.shape is not None:
        return contestants.of_shape(args.shape, args.methods or ("bfloat16", "any4"), args.head or "bfloat16")
    made: dict[str, contestants.Contestant] = {}
    for name, label in contestants.labels(args.models or ["tiny"]).items():
        model = open_model(name)
        made |= (
            contestants.with_rounded_inputs(label, model)
            if args.inputs
            else {label: contestants.contestant(label, model)}
        )
    return {label: contestants.Entry.of(each) for label, each in made.items()}


def _methods(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in shapes.METHODS:
            raise argparse.ArgumentTypeError(f"got {name!r}, need some of {', '.join(shapes.METHODS)}")
    return names


def decode_table(rows: Sequence[Any], facts: Sequence[str]) -> str:
    """A table of the rows of `decode.run`, with these facts of the contestants."""
    header = ["prompt", "batch", "MB/token", "prefill ms", "tokens/s", "a row", "best", "ms/token", "times", "GB/s"]
    return table(
        [*facts, *header, "of the stream", "GB", "compile s"],
        [
            [
                *(str(row[fact]) for fact in facts),
                str(row["prompt_tokens"]),
                str(row["batch"]),
                f"{row['read_mb_per_token']:.1f}",
                f"{row['prefill_ms']:.1f}",
                f"{row['decode_tokens_per_s']:.1f}",
                f"{row['decode_tokens_per_s_of_a_row']:.1f}",
                f"{row['best_decode_tokens_per_s']:.1f}",
                f"{row['decode_ms_per_token']:.2f}",
                "" if row["speed_ratio_to_first"] is None else f"{row['speed_ratio_to_first']:.2f}",
                f"{row['gb_per_s']:.2f}",
                f"{row['share_of_streaming_read']:.0%}",
                f"{row['peak_gb']:.1f}",
                f"{row['prefill_compile_s'] + row['decode_compile_s']:.1f}",
            ]
            for row in rows
        ],
    )


def profile_table(rows: Sequence[Any], facts: Sequence[str]) -> str:
    """A table of the rows' classes of kernels, with these facts of the contestants."""
    return table(
        [*facts, "prompt", "batch", "ms/token", *profile.CLASSES, "gaps", "launches"],
        [
            [
                *(str(row[fact]) for fact in facts),
                str(row["prompt_tokens"]),
                str(row["batch"]),
                f"{row['decode_ms_per_token']:.3f}",
                *(_of_class(row, kind) for kind in profile.CLASSES),
                f"{row['gaps_ms']:.3f}",
                f"{row['launches_per_token']:.0f}",
            ]
            for row in rows
        ],
    )


def _of_class(row: Any, kind: str) -> str:
    ms = row[f"{kind}_ms"]
    return "unknown" if ms is None else f"{ms:.3f} ({row[f'{kind}_launches']:.0f})"
