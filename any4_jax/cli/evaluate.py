"""`any4 eval`: the perplexity of a model or checkpoint, and how far it is from another one."""

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from any4_jax.benchmarks.machine import command_line
from any4_jax.cli.caches import add_cache, cache_for, cache_from, cache_words
from any4_jax.cli.errors import CommandLineError, WorkError
from any4_jax.cli.numbers import at_least, count
from any4_jax.cli.output import progress, table, tell
from any4_jax.cli.runs import Run, fingerprint
from any4_jax.cli.sources import MODEL_HELP, add_inputs, open_model
from any4_jax.cli.token_files import FILES_HELP, read_tokens
from any4_jax.evaluation import CORPORA, Divergence, Perplexity, Tokens, divergence, perplexity, read_corpus
from any4_jax.methods import CATALOGUE
from any4_jax.surgery import quantized_leaves

SEQLEN = 2048


def add(commands: Any, common: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Adds the command; `argv` is its command line, which results record."""
    parser = commands.add_parser("eval", parents=[common], help="perplexity of a model", allow_abbrev=False)
    parser.add_argument("model", metavar="CKPT_OR_MODEL", help=f"a checkpoint, {MODEL_HELP}")
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", default=[], help=f"perplexity on data sets: {', '.join(CORPORA)}"
    )
    parser.add_argument(
        "--datasets",
        metavar="DIR",
        help="where copies of the data sets are, each in a folder of its name on the hub, such as "
        f"{CORPORA['wikitext-2'].path} (default: they are fetched, and kept)",
    )
    parser.add_argument("--text", nargs="+", metavar="FILE", default=[], help=f"perplexity on a file: {FILES_HELP}")
    parser.add_argument(
        "--field",
        default="text",
        metavar="NAME",
        help="of a line of a .jsonl file, that holds its text (default: text)",
    )
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
    parser.add_argument(
        "--windows", type=count, metavar="N", help="use only the first N windows (default: all, or the data set's 256)"
    )
    parser.add_argument(
        "--allow-training-text",
        action="store_true",
        help="measure on a text even if the model was trained on passages of it, which is refused otherwise",
    )
    parser.add_argument(
        "--out",
        metavar="DIR|FILE.json",
        help="write the results to DIR/results.json and the settings to DIR/args.json, or the results to one file; "
        "what DIR has already stays, and isn't measured again",
    )
    parser.add_argument("--again", action="store_true", help="measure anew what DIR has")
    parser.set_defaults(run=run, words=["any4", *argv])


def run(args: argparse.Namespace) -> int:
    if not args.tasks and not args.text:
        raise CommandLineError("nothing to measure on; give --text FILE, --tasks wikitext-2, or both")
    for task in args.tasks:
        if task not in CORPORA:
            raise CommandLineError(f"got the task {task!r}, need some of {', '.join(CORPORA)}")
    cache = cache_from(args)
    kept = Run(args.out, _settings(args), command_line(args.words), args.again)
    asked = list(dict.fromkeys([*args.tasks, *args.text]))
    missing = [name for name in asked if not kept.has(name)]
    if missing:
        _measure(args, missing, cache, kept)
    found = {name: kept.results[name] for name in asked}
    print(table(*_summary(found)))
    against = {name: r["against"]["position_kl_nats"] for name, r in found.items() if "against" in r}
    if against:
        print("\nKL in nats per token by the position in a window, and over all positions:")
        print(table(*_by_position(against)))
    tell(lambda: kept.content() | {"results": found})
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the results depend on, for args.json."""
    return {
        "model": args.model,
        "model_sha256": fingerprint(args.model),
        "inputs": args.inputs,
        "against": args.against,
        "against_sha256": None if args.against is None else fingerprint(args.against),
        "cache": cache_words(args),
        "seqlen": args.seqlen,
        "windows": args.windows,
        "field": args.field,
    }


def _measure(args: argparse.Namespace, names: Sequence[str], cache: Any, kept: Run) -> None:
    """Measures these texts one by one, and keeps each result at once."""
    model = open_model(args.model, args.inputs)
    cache = cache_for(model, args, cache)
    against = None if args.against is None else open_model(args.against)
    opened = [model] if against is None else [against, model]
    seqlen = args.seqlen or min(SEQLEN, *(each.config.max_position_embeddings for each in opened))
    kept.facts = _facts(model)
    # All are read before any is measured, so that a wrong name is told at once.
    for name, tokens in {name: _tokens(name, args, opened, seqlen) for name in names}.items():
        with progress(name, "window") as bar:
            settings: dict[str, Any] = dict(seqlen=seqlen, windows=args.windows, cache=cache)
            settings["allow_training_text"] = args.allow_training_text
            if against is None:
                result = _of_perplexity(perplexity(model, tokens.ids, progress=bar, **settings))
            else:
                both = divergence(against, model, tokens.ids, progress=bar, **settings)
                result = _of_perplexity(both.model) | {"against": _of_divergence(both)}
        kept.add(name, result | {"source": tokens.source})


def _facts(model: Any) -> dict[str, Any]:
    """What tables tell of a model: its method, and what its quantized layers take."""
    leaves = quantized_leaves(model)
    if not leaves:
        return {"method": "float"}
    entries = model.recipe.linears if model.recipe is not None else ()
    stored, weights = (
        sum(leaf.nbytes for leaf in leaves.values()),
        sum(math.prod(leaf.shape) for leaf in leaves.values()),
    )
    names = sorted({_words(method) for _, method, _ in entries})
    return {"method": " + ".join(names), "bits_per_weight": 8 * stored / weights, "quantized_bytes": stored}


def _words(method: Any) -> str:
    """A method's name, with those of the methods that it holds: gptq(any4)."""
    held = (getattr(method, field.name) for field in dataclasses.fields(method))
    inner = [_words(each) for each in held if getattr(each, "name", None) in CATALOGUE]
    return f"{method.name}({', '.join(inner)})" if inner else method.name


def _tokens(name: str, args: argparse.Namespace, models: Sequence[Any], seqlen: int) -> Tokens:
    """The tokens of a task or file, which are the same for all models.

    Raises:
      WorkError: they can't be had, or are not the same.
    """

    def read(tokenizer: Any) -> Tokens:
        if name not in CORPORA or name in args.text:
            return read_tokens(name, tokenizer, args.field)
        if tokenizer is None:
            raise WorkError(f"{args.model} has no tokenizer, and {name} is a text; add its tokenizer.json")
        try:
            return read_corpus(name, tokenizer, seqlen, windows=args.windows, folder=args.datasets)
        except ImportError as error:
            raise WorkError(str(error)) from error

    first, *others = models
    tokens = read(first.tokenizer)
    for other in others:
        if other.tokenizer != first.tokenizer and not np.array_equal(read(other.tokenizer).ids, tokens.ids):
            raise WorkError(
                f"the tokenizers of {args.model} and {args.against} give different tokens for {name}, and a comparison "
                "needs the same ones; give models that share a tokenizer"
            )
    return tokens


def _summary(found: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["text", "perplexity", "error", "nats/token", "windows"]
    rows = [
        [
            name,
            f"{r['perplexity']:.4f}",
            f"{r['standard_error']:.4f}",
            f"{r['nats_per_token']:.5f}",
            f"{r['windows']} x {r['seqlen']}",
        ]
        for name, r in found.items()
    ]
    if all("against" in r for r in found.values()):
        header += ["KL nats/token", "error", "99%", "top-1 agreement", "flips"]
        for row, compared in zip(rows, (r["against"] for r in found.values()), strict=True):
            row += [f"{compared['kl_nats_per_token']:.5f}", f"{compared['kl_standard_error']:.5f}"]
            row += [f"{compared['kl_99_percent_nats']:.5f}", f"{compared['top1_agreement']:.2%}"]
            row += [f"{compared['flips']:.2%}"]
    return header, rows


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
