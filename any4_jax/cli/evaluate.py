"""`any4 eval`: perplexity, how far a model is from another one, and its answers to tasks."""

import argparse
from collections.abc import Sequence
from typing import Any

from any4_jax.benchmarks.machine import command_line
from any4_jax.cli.caches import add_cache, cache_for, cache_from, cache_words
from any4_jax.cli.errors import CommandLineError
from any4_jax.cli.eval_tasks import Harness, add_harness, metrics_table
from any4_jax.cli.eval_texts import SEQLEN, measure, shown, tokens_of
from any4_jax.cli.numbers import at_least, count
from any4_jax.cli.output import tell
from any4_jax.cli.runs import Run, facts_of, fingerprint
from any4_jax.cli.sources import MODEL_HELP, add_inputs, open_model
from any4_jax.cli.token_files import FILES_HELP
from any4_jax.evaluation import CORPORA
from any4_jax.evaluation.harness_tasks import GROUPS


def add(commands: Any, common: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Adds the command; `argv` is its command line, which results record."""
    parser = commands.add_parser("eval", parents=[common], help="perplexity of a model, and tasks", allow_abbrev=False)
    parser.add_argument("model", metavar="CKPT_OR_MODEL", help=f"a checkpoint, {MODEL_HELP}")
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        default=[],
        help=f"perplexity on data sets: {', '.join(CORPORA)}; or tasks and groups of lm-evaluation-harness, such as "
        f"{', '.join((*GROUPS, 'mmlu', 'gsm8k', 'bbh'))}",
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
    add_harness(parser)
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
    texts = list(dict.fromkeys([*(task for task in args.tasks if task in CORPORA), *args.text]))
    asked = [task for task in args.tasks if task not in CORPORA]
    judge = Harness(args, asked) if asked else None
    cache = cache_from(args)
    kept = Run(args.out, _settings(args), command_line(args.words), args.again)
    tasks = [] if judge is None else judge.tasks
    new_texts, new_tasks = ([name for name in names if not kept.has(name)] for names in (texts, tasks))
    if new_texts or new_tasks:
        model = open_model(args.model, args.inputs)
        cache = cache_for(model, args, cache)
        kept.facts = facts_of(model)
        _measure_texts(args, new_texts, model, cache, kept)
        if judge is not None:
            judge.measure(new_tasks, model, cache, kept)
    found = {name: kept.results[name] for name in texts}
    answered = {name: kept.results[name] for name in tasks}
    print("\n\n".join([*([shown(found)] if found else []), *([metrics_table(answered)] if answered else [])]))
    tell(lambda: kept.content() | {"results": found | answered})
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
        "limit": args.limit,
        "shots": args.shots,
        "chat": args.chat,
        "task_folder": args.task_folder,
    }


def _measure_texts(args: argparse.Namespace, names: Sequence[str], model: Any, cache: Any, kept: Run) -> None:
    """Measures these texts one by one, and keeps each result at once."""
    if not names:
        return
    against = None if args.against is None else open_model(args.against)
    opened = [model] if against is None else [against, model]
    seqlen = args.seqlen or min(SEQLEN, *(each.config.max_position_embeddings for each in opened))
    # All are read before any is measured, so that a wrong name is told at once.
    for name, tokens in {name: tokens_of(name, args, opened, seqlen) for name in names}.items():
        settings = dict(seqlen=seqlen, windows=args.windows, cache=cache, allow_training_text=args.allow_training_text)
        kept.add(name, measure(name, tokens, model, against, **settings))
