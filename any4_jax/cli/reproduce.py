"""`any4 reproduce`: the published tables, and what is measured here by the same settings."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from any4_jax.benchmarks.machine import command_line
from any4_jax.cli.errors import CommandLineError
from any4_jax.cli.eval_tasks import add_harness
from any4_jax.cli.numbers import count
from any4_jax.cli.output import table, tell
from any4_jax.cli.reproduced import NEEDS_CODE, Figure, Loss, Measured, chosen_tasks, compared, lost
from any4_jax.cli.runs import Run
from any4_jax.cli.sources import MODEL_HELP
from any4_jax.cli.token_files import FILES_HELP
from any4_jax.evaluation import CORPORA
from any4_jax.evaluation.published import Row, find_rows, published_rows

_SHOWN = 3
"""A list shows so many values of a row."""


def add(commands: Any, common: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Adds the command; `argv` is its command line, which results record."""
    parser = commands.add_parser(
        "reproduce",
        parents=[common],
        help="published tables, and the same measured here",
        description="Lists the published tables of any4, qllm-infer and LLM-FP4. With --model, quantizes a model by "
        "the settings of a row, measures what the row tells of, and prints that beside the published values. Tasks "
        f"that run generated code ({' and '.join(NEEDS_CODE)}) are left out without --allow-code.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="a row, such as any4/llama-3.2-1b/nf4, or a table or group of tables, such as any4/llama-3.2-1b "
        "(default: list the tables)",
    )
    parser.add_argument("--model", metavar="MODEL", help=f"run these rows on it: {MODEL_HELP}")
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="only these texts and tasks of the rows (default: all)"
    )
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="[TASK=]FILE",
        default=[],
        help="take the text of TASK, such as wikitext-2, from a file, or measure on another text, for which nothing is "
        f"published; a file is {FILES_HELP}; no other text or task is measured then, unless --tasks names it",
    )
    parser.add_argument("--field", default="text", metavar="NAME", help="of a line of a .jsonl file (default: text)")
    parser.add_argument(
        "--datasets",
        metavar="DIR",
        help="where copies of the data sets are, as any4 eval takes them (default: fetched)",
    )
    parser.add_argument(
        "--calibrate",
        metavar="prompt|essays|FILE",
        help="what methods and caches learn from (default: the data set that the row tells)",
    )
    parser.add_argument(
        "--windows", type=count, metavar="N", help="use only the first N windows of each text (default: as published)"
    )
    add_harness(parser)
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="write the results of each row to DIR/NAME, as any4 eval does, for any4 tables; what is there already "
        "isn't measured again",
    )
    parser.add_argument("--again", action="store_true", help="measure anew what DIR has")
    parser.set_defaults(run=run, words=["any4", *argv])


def run(args: argparse.Namespace) -> int:
    try:
        rows = list(published_rows().values()) if args.name is None else find_rows(args.name)
    except ValueError as error:
        raise CommandLineError(str(error)) from error
    if args.model is None:
        return _list(args, rows)
    if args.name is None:
        raise CommandLineError("got --model and no NAME of a row or table to reproduce; any4 reproduce lists them")
    files = _files(args.text)
    plans = chosen_tasks(args, rows, files)
    if not any(plans.values()):
        raise CommandLineError(
            f"nothing of {args.name} is left to measure; give --text, --tasks, or --allow-code for "
            f"{' and '.join(NEEDS_CODE)}"
        )
    content, model, told = [], Measured(args), set[str]()
    floats: dict[str, tuple[Row, Any]] = {}
    losses: list[Loss] = []
    for row in (row for row in rows if plans[row.name]):
        out = None if args.out is None else str(Path(args.out) / row.name)
        kept = Run(out, _settings(args, row, files), command_line(args.words), args.again)
        model.measure(row, plans[row.name], files, kept)
        results = {task: kept.results[task] for task in plans[row.name]}
        found, notes = compared(row, results), model.notes(row)
        print(_shown(row, [note for note in notes if note not in told], found, model.is_like(row)), flush=True)
        told.update(notes)
        content.append(_published(row) | {"same_shape": model.is_like(row), "notes": notes, "figures": _told(found)})
        of_table = row.name.rpartition("/")[0]
        if row.method is None and row.cache is None:
            floats[of_table] = row, results
        elif of_table in floats:
            losses += lost(row, results, *floats[of_table])
    if losses:
        print(_lost(losses))
    tell(lambda: {"model": args.model, "rows": content, "lost": [dataclasses.asdict(each) for each in losses]})
    return 0


def _list(args: argparse.Namespace, rows: Sequence[Row]) -> int:
    for flag in ("text", "tasks", "calibrate", "out"):
        if getattr(args, flag):
            raise CommandLineError(
                f"got --{flag} without --model, which is what is measured; name one, or leave it out"
            )
    if args.name is None:
        tables: dict[str, list[Row]] = {}
        for row in rows:
            tables.setdefault(row.name.rpartition("/")[0], []).append(row)
        lines = [
            [name, each[0].subject.hub, ", ".join(row.name.rpartition("/")[2] for row in each[:6])
             + (f" and {len(each) - 6} more" if len(each) > 6 else "")]
            for name, each in tables.items()
        ]  # fmt: skip
        print(_left(["table", "of the model", "rows"], lines))
        print("\nany4 reproduce TABLE lists the values of its rows; with --model MODEL it measures them.")
    else:
        lines = [[row.name, _values(row)] for row in rows]
        print(_left(["row", "published"], lines))
        for source in dict.fromkeys(f"{row.source}; {row.subject.hub}" for row in rows):
            print(f"from {source}")
    tell(lambda: {"rows": [_published(row) for row in rows]})
    return 0


def _left(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are all aligned to the left."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in (header, *rows)]
    return table(padded[0], padded[1:])


def _values(row: Row) -> str:
    shown = [f"{task} {value:g}{'' if task in CORPORA else ' %'}" for task, value in row.values.items()]
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")


def _files(given: Sequence[str]) -> dict[str, str]:
    """The files of --text by the task that they are the text of, or by their own names."""
    files = {}
    for each in given:
        task, separator, file = each.partition("=")
        if separator and task in CORPORA and not Path(each).exists():
            files[task] = file
        else:
            files[each] = each
    return files


def _settings(args: argparse.Namespace, row: Row, files: Mapping[str, str]) -> dict[str, Any]:
    """What the results depend on, for args.json, with what is published."""
    return {
        "reproduces": row.name,
        "model": args.model,
        "recipe": row.method,
        "cache": row.cache,
        "calibrate": args.calibrate,
        "text": dict(files),
        "windows": args.windows,
        "field": args.field,
        "limit": args.limit,
        "shots": args.shots,
        "chat": args.chat,
        "task_folder": args.task_folder,
        "published": dict(row.values),
    }


def _shown(row: Row, notes: Sequence[str], found: Sequence[Figure], same: bool) -> str:
    lines = [f"{row.name}: {row.source}; {row.subject.hub}", *(f"note: {note}" for note in notes)]
    cells = []
    for each in found:
        metric = each.metric if "perplexity" in each.metric else f"{each.metric} %"
        error, published = ("" if value is None else f"{value:.3f}" for value in (each.error, each.published))
        # Another model's difference would tell of the models.
        delta = f"{each.value - each.published:+.3f}" if same and each.published is not None else ""
        cells.append([each.task, metric, f"{each.value:.3f}", error, published, delta])
    lines.append(table(["text or task", "metric", "measured", "error", "published", "difference"], cells))
    return "\n".join(lines) + "\n"


def _lost(losses: Sequence[Loss]) -> str:
    cells = [
        [each.row, each.text, f"{each.value:.4f}"]
        + ["" if value is None else f"{value:.4f}" for value in (each.error, each.published)]
        for each in losses
    ]
    return "nats per token lost against the float model:\n" + table(
        ["row", "text", "measured", "error", "published"], cells
    )


def _published(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "source": row.source,
        "published_for": row.subject.hub,
        "method": row.method,
        "cache": row.cache,
        "published": dict(row.values),
    }


def _told(found: Sequence[Figure]) -> list[dict[str, Any]]:
    return [
        {"task": f.task, "metric": f.metric, "measured": f.value, "error": f.error, "published": f.published}
        for f in found
    ]
