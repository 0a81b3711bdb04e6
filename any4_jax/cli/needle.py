"""`any4 needle`: whether a model finds a pass key that is hidden in a long text."""

import argparse
import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

from any4_jax.cli.caches import add_cache, cache_for, cache_from
from any4_jax.cli.numbers import between, count
from any4_jax.cli.output import progress, table, tell
from any4_jax.cli.sources import MODEL_HELP, add_inputs, open_model, read_text
from any4_jax.data import essays
from any4_jax.evaluation.drawing import check_matplotlib
from any4_jax.evaluation.heat_map import heat_map
from any4_jax.evaluation.needle import KEYS, Trial, needle, shares
from any4_jax.whole_file import check_target, write_whole

_SHARES = (0.4, 0.6, 0.8, 1.0)
_ANSWER = 64
"""Tokens of the context that are left for the answer, where lengths aren't given."""


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "needle",
        parents=[common],
        help="whether a model finds a fact in a long text",
        description="Hides a pass key in a long text, asks for it, and counts the answers that contain it.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="CKPT_OR_MODEL", help=f"a checkpoint, {MODEL_HELP}")
    parser.add_argument("--text", metavar="FILE", help="the haystack, repeated as needed (default: the bundled essays)")
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=count,
        metavar="N",
        help="tokens of the prompts (default: 40, 60, 80 and 100 percent of the model's context without "
        f"{_ANSWER} for the answer)",
    )
    parser.add_argument(
        "--depths",
        nargs="+",
        type=between(0, 100),
        metavar="P",
        default=[0.0, 25.0, 50.0, 75.0, 100.0],
        help="where the key is, in percent of the text (default: 0 25 50 75 100)",
    )
    parser.add_argument(
        "--keys",
        nargs="+",
        metavar="KEY",
        default=list(KEYS),
        help=f"what is hidden, each in texts of its own (default: {' '.join(KEYS)})",
    )
    parser.add_argument("--csv", metavar="FILE", help="write each answer here")
    parser.add_argument("--png", metavar="FILE", help="draw a heat map here (needs matplotlib)")
    add_inputs(parser, "the model's")
    add_cache(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for path in (args.csv, args.png):
        if path is not None:
            check_target(path)
    if args.png is not None:
        check_matplotlib()
    cache = cache_from(args)
    text = essays() if args.text is None else read_text(args.text)
    model = open_model(args.model, args.inputs)
    cache = cache_for(model, args, cache)
    context = model.config.max_position_embeddings
    lengths = args.lengths or sorted({int(share * (context - _ANSWER)) for share in _SHARES})
    depths = [percent / 100 for percent in args.depths]
    with progress("needle", "text") as bar:
        trials = needle(model, text, lengths=lengths, depths=depths, keys=args.keys, cache=cache, progress=bar)
    print(_table(trials))
    tell(lambda: {"model": args.model, "trials": [dataclasses.asdict(trial) for trial in trials]})
    if args.csv is not None:
        write_whole(args.csv, _csv(trials))
    if args.png is not None:
        heat_map(trials, args.png, args.model if args.cache is None else f"{args.model}, {args.cache} cache")
    return 0


def _table(trials: Sequence[Trial]) -> str:
    lengths, depths, found = shares(trials)
    rows = [
        ("all", found.mean(axis=0)),
        *((f"{100 * depth:g} %", row) for depth, row in zip(depths, found, strict=True)),
    ]
    header = ["depth", *(f"{length} tokens" for length in lengths)]
    return table(header, [[name, *(f"{share:.0%}" for share in row)] for name, row in rows])


def _csv(trials: Sequence[Trial]) -> str:
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["length_tokens", "depth_percent", "key", "found", "answer"])
    rows.writerows([t.length, f"{100 * t.depth:g}", t.key, int(t.found), t.answer] for t in trials)
    return file.getvalue()
