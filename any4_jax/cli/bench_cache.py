"""`any4 bench cache`: what a step of decoding takes after a long context, by the cache that holds it."""

import argparse

from any4_jax.benchmarks import cache, machine, shapes
from any4_jax.benchmarks.plot import cache_plot
from any4_jax.benchmarks.timing import StreamingRead
from any4_jax.cli.bench_shared import add_common, check, counts, finish, heading
from any4_jax.cli.numbers import count
from any4_jax.cli.output import progress, table

DEFAULT = ("dense", "kivi-4", "kivi-2", "kvquant-4")
COLUMNS = {
    "cache": "cache",
    "kernel": "kernel",
    "context": "context",
    "bytes_per_token": "bytes/token",
    "bytes_ratio_to_first": "of the first's",
    "attention_ms": "attention ms",
    "attention_speed_ratio_to_first": "times",
    "step_ms": "step ms",
    "step_speed_ratio_to_first": "times",
}


def add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        choices=shapes.CONFIGS,
        default="llama-3.1-8b",
        help="the model's shape; weights and what caches hold are random, in bfloat16 (default: llama-3.1-8b)",
    )
    parser.add_argument(
        "--contexts",
        type=counts,
        default=(2048, 32768),
        metavar="N,...",
        help="tokens that a cache holds before the first step (default: 2048,32768)",
    )
    parser.add_argument(
        "--caches",
        type=_caches,
        default=DEFAULT,
        metavar="CACHE,...",
        help=f"of {', '.join(cache.CACHES)}; compared with the first (default: {','.join(DEFAULT)})",
    )
    parser.add_argument(
        "--method",
        choices=shapes.METHODS,
        default="any4",
        help="how the linears of the model's blocks are stored (default: any4)",
    )
    parser.add_argument(
        "--attention-only", action="store_true", help="leave out the whole steps, and with them the model's weights"
    )
    parser.add_argument(
        "--batch", type=count, default=1, metavar="B", help="rows that are decoded together (default: 1)"
    )
    parser.add_argument("--tokens", type=count, default=32, metavar="N", help="steps of a turn (default: 32)")
    parser.add_argument("--svg", metavar="FILE", help="plot the time of a step against the context here")
    add_common(parser, rounds=5)
    parser.set_defaults(run=run_cache)


def run_cache(args: argparse.Namespace) -> int:
    check(args, args.svg)
    method = None if args.attention_only else args.method
    config = cache.CacheBench(args.shape, method, args.contexts, args.batch, args.tokens, args.rounds)
    stream = StreamingRead(machine.platform())
    with progress("cache", "program") as bar:
        rows = cache.run(args.caches, config, stream=stream, progress=bar)
    settings = {"shape": args.shape, "method": method, "tokens": args.tokens, "rounds": args.rounds}
    result = machine.result("cache", args.words, settings=settings | stream.settings(), rows=rows)
    print(heading(result) + "\n")
    print(table(tuple(COLUMNS.values()), [[_shown(row[name]) for name in COLUMNS] for row in rows]))
    print(
        f"\n{args.tokens} steps of {args.batch} x {args.shape}; medians of {args.rounds} turns; attention: that of all "
        "blocks alone; times: speed over the first cache"
    )
    return finish(args, result, args.svg, lambda: cache_plot(rows, f"{result.device.name}: {args.shape}, by cache"))


def _shown(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _caches(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in cache.CACHES:
            raise argparse.ArgumentTypeError(f"got {name!r}, need some of {', '.join(cache.CACHES)}")
    return names
