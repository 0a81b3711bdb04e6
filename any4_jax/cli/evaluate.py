"""`any4 eval`: the perplexity of a model or checkpoint, and how far it is from another one."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from any4_jax.cli.caches import add_cache, cache_for, cache_from
from any4_jax.cli.errors import CommandLineError, WorkError
from any4_jax.cli.numbers import at_least, count
from any4_jax.cli.output import as_json, progress, table, tell
from any4_jax.cli.sources import MODEL_HELP, add_inputs, open_model, read_text
from any4_jax.evaluation import Divergence, Perplexity, divergence, perplexity
from any4_jax.whole_file import check_target, write_whole

SEQLEN = 2048


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("eval", parents=[common], help="perplexity of a model", allow_abbrev=False)
    parser.add_argument("model", metavar="CKPT_OR_MODEL", help=f"a checkpoint, {MODEL_HELP}")
    parser.add_argument(
        "--tasks", nargs="+", choices=sorted(TASKS), default=[], help="data sets, fetched from the network"
    )
    parser.add_argument("--text", metavar="FILE", help="measure on the text of this file")
    parser.add_argument(
        "--against",
        metavar="MODEL",
        help="also tell how far the predictions are from those of this model, such as the float one: the mean and the "
        "99th percentile of KL(MODEL || CKPT_OR_MODEL), how often both find the same token likeliest, and how often "
        "one of them alone is right (flips)",
    )
    parser.add_argument(
        "--seqlen",
        type=at_least(2),
        metavar="N",
        help=f"tokens in a window (default: {SEQLEN}, or the model's context if that is shorter)",
    )
    add_inputs(parser, "measure the model while its")
    add_cache(parser, skipped=("exact_prompt",))
    parser.add_argument("--windows", type=count, metavar="N", help="use only the first N windows")
    parser.add_argument("--out", metavar="FILE", help="write the results here as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not args.tasks and args.text is None:
        raise CommandLineError("nothing to measure on; give --text FILE, --tasks wikitext-2, or both")
    if args.out is not None:
        check_target(args.out)
    cache = cache_from(args)
    sources = {task: TASKS[task]() for task in args.tasks}
    if args.text is not None:
        sources[args.text] = read_text(args.text)
    model = open_model(args.model, args.inputs)
    cache = cache_for(model, args, cache)
    against = None if args.against is None else open_model(args.against)
    opened = [model] if against is None else [model, against]
    seqlen = args.seqlen or min(SEQLEN, *(each.config.max_position_embeddings for each in opened))

    results: dict[str, dict[str, Any]] = {}
    for name, text in sources.items():
        with progress(name, "window") as bar:
            if against is None:
                found = perplexity(model, text, seqlen=seqlen, windows=args.windows, progress=bar, cache=cache)
                results[name] = _of_perplexity(found)
            else:
                both = divergence(against, model, text, seqlen=seqlen, windows=args.windows, progress=bar, cache=cache)
                results[name] = _of_perplexity(both.model) | {"against": _of_divergence(both)}
    header = ["text", "perplexity", "error", "nats/token", f"windows of {seqlen}"]
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
    if against is not None:
        header += ["KL nats/token", "error", "99%", "top-1 agreement", "flips"]
        for row, r in zip(rows, results.values(), strict=True):
            compared = r["against"]
            row += [f"{compared['kl_nats_per_token']:.5f}", f"{compared['kl_standard_error']:.5f}"]
            row += [f"{compared['kl_99_percent_nats']:.5f}", f"{compared['top1_agreement']:.2%}"]
            row += [f"{compared['flips']:.2%}"]
    print(table(header, rows))
    if against is not None:
        print(f"\nKL in nats per token at these positions of a window, and over all of its {seqlen - 1}:")
        print(table(*_by_position({name: r["against"]["position_kl_nats"] for name, r in results.items()})))
    content = {"model": args.model} | ({} if args.inputs is None else {"inputs": args.inputs})
    content |= {} if against is None else {"against": args.against}
    content |= {} if cache is None else {"cache": str(cache)}
    content |= {"results": results}
    tell(lambda: content)
    if args.out is not None:
        write_whole(args.out, as_json(content) + "\n")
    return 0


def _by_position(found: Mapping[str, Sequence[float]]) -> tuple[list[str], list[list[str]]]:
    """A table of mean KLs over ranges of positions that double, and over all."""
    length = max(map(len, found.values()))
    starts = [0, *(2**power for power in range(4, length.bit_length()) if 2**power < length)]
    ends = [*starts[1:], length]
    header = ["text", *(f"{start + 1}-{end}" for start, end in zip(starts, ends, strict=True)), "all"]
    rows = []
    for name, values in found.items():
        parts = [*(values[start:end] for start, end in zip(starts, ends, strict=True)), values]
        rows.append([name, *(f"{np.mean(part):.5f}" for part in parts)])
    return header, rows


def _of_perplexity(measured: Perplexity) -> dict[str, Any]:
    return {
        "perplexity": measured.value,
        "standard_error": measured.bootstrap(),
        "nats_per_token": measured.nll,
        "windows": len(measured.window_nll),
        "seqlen": measured.seqlen,
        "window_nats_per_token": measured.window_nll.tolist(),
    }


def _of_divergence(measured: Divergence) -> dict[str, Any]:
    return {
        "kl_nats_per_token": measured.kl,
        "kl_standard_error": measured.bootstrap(),
        "kl_99_percent_nats": measured.kl_quantile(0.99),
        "top1_agreement": measured.top1,
        "flips": measured.flips,
        "flips_lost": measured.lost,
        "flips_won": measured.won,
        "perplexity": measured.reference.value,
        "nats_per_token": measured.reference.nll,
        "window_kl_nats_per_token": measured.window_kl.tolist(),
        "window_top1_agreement": measured.window_top1.tolist(),
        "position_kl_nats": measured.position_kl.tolist(),
        "position_top1_agreement": measured.position_top1.tolist(),
    }


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
