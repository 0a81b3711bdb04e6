"""`any4 eval`: the perplexity of a model or checkpoint."""

import argparse
import json
from pathlib import Path
from typing import Any

from any4_jax.cli.errors import CommandLineError, WorkError
from any4_jax.cli.numbers import at_least, count
from any4_jax.cli.output import progress, table
from any4_jax.cli.sources import MODEL_HELP, open_model, read_text
from any4_jax.evaluation import perplexity

SEQLEN = 2048


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("eval", parents=[common], help="perplexity of a model", allow_abbrev=False)
    parser.add_argument("model", metavar="CKPT_OR_MODEL", help=f"a checkpoint, {MODEL_HELP}")
    parser.add_argument(
        "--tasks", nargs="+", choices=sorted(TASKS), default=[], help="data sets, fetched from the network"
    )
    parser.add_argument("--text", metavar="FILE", help="measure on the text of this file")
    parser.add_argument(
        "--seqlen",
        type=at_least(2),
        metavar="N",
        help=f"tokens in a window (default: {SEQLEN}, or the model's context if that is shorter)",
    )
    parser.add_argument("--windows", type=count, metavar="N", help="use only the first N windows")
    parser.add_argument("--out", metavar="FILE", help="write the results here as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not args.tasks and args.text is None:
        raise CommandLineError("nothing to measure on; give --text FILE, --tasks wikitext-2, or both")
    if args.out is not None and not Path(args.out).absolute().parent.is_dir():
        raise WorkError(f"{args.out} can't be written because its folder is missing; create it first")
    sources = {task: TASKS[task]() for task in args.tasks}
    if args.text is not None:
        sources[args.text] = read_text(args.text)
    model = open_model(args.model)
    seqlen = args.seqlen or min(SEQLEN, model.config.max_position_embeddings)

    results: dict[str, dict[str, Any]] = {}
    for name, text in sources.items():
        with progress(name, "window") as bar:
            measured = perplexity(model, text, seqlen=seqlen, windows=args.windows, progress=bar)
        results[name] = {
            "perplexity": measured.value,
            "standard_error": measured.bootstrap(),
            "nats_per_token": measured.nll,
            "windows": len(measured.window_nll),
            "seqlen": seqlen,
            "window_nats_per_token": measured.window_nll.tolist(),
        }
    rows = [
        [
            name,
            f"{r['perplexity']:.4f}",
            f"{r['standard_error']:.4f}",
            f"{r['nats_per_token']:.5f}",
            str(r["windows"]),
        ]
        for name, r in results.items()
    ]
    print(table(["text", "perplexity", "error", "nats/token", f"windows of {seqlen}"], rows))
    if args.out is not None:
        Path(args.out).write_text(json.dumps({"model": args.model, "results": results}, indent=2) + "\n")
    return 0


def _wikitext2() -> str:
    """The raw test split of WikiText-2, its lines joined by blank lines."""
    try:
        import datasets
    except ImportError:
        raise WorkError(
            "the task wikitext-2 needs the package datasets, which isn't installed; "
            "run pip install 'any4_jax[eval]', or give the text as --text FILE"
        ) from None
    try:
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    except Exception as error:  # the package raises dozens of types for this one failure
        raise WorkError(
            f"wikitext-2 can't be fetched ({type(error).__name__}); connect to the network, or give --text FILE"
        ) from error
    return "\n\n".join(rows["text"])


TASKS = {"wikitext-2": _wikitext2}
