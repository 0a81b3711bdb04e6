"""`any4 tables`: collects the results of several evaluations into one table."""

import argparse
import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

from any4_jax.cli.errors import CommandLineError
from any4_jax.cli.figures import SIGNIFICANT, Collected, Figure, base_of, collect, figures
from any4_jax.cli.output import tell
from any4_jax.whole_file import check_target, write_whole

# In the table are perplexity, KL and, of each task, the first metric; the CSV file has all.
_SHOWN = ("perplexity", "KL")
_DIGITS = {"perplexity": 3, "KL": 4}


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "tables",
        parents=[common],
        help="the results of several evaluations in one table",
        description="Prints a table in Markdown: a row for each run, a column for each text or task, with errors and "
        "with the differences from one of the runs.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="DIR", help="what any4 eval --out wrote, or folders of such folders")
    parser.add_argument(
        "--base", metavar="DIR", help="the run that the others are compared with (default: the first of a float model)"
    )
    parser.add_argument("--markdown", metavar="FILE", help="write the table here too")
    parser.add_argument("--csv", metavar="FILE", help="write all figures here, one a line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for path in (args.markdown, args.csv):
        if path is not None:
            check_target(path)
    if args.markdown is not None and args.markdown == args.csv:
        raise CommandLineError(f"got {args.csv} for the table and for the figures; give each a file of its own")
    runs = collect(args.runs)
    base = base_of(runs, args.base)
    found = figures(runs, base)
    text = markdown(runs, base, found)
    print(text, end="")
    tell(
        lambda: {
            "base": base.name,
            "runs": [{"run": each.name} | {k: v for k, v in each.content.items() if k != "results"} for each in runs],
            "figures": [dataclasses.asdict(figure) | {"within_error": figure.within_error} for figure in found],
        }
    )
    if args.markdown is not None:
        write_whole(args.markdown, text)
    if args.csv is not None:
        write_whole(args.csv, _csv(runs, found))
    return 0


def markdown(runs: Sequence[Collected], base: Collected, found: Sequence[Figure]) -> str:
    """A Markdown table of the figures, a row for each run, and what its signs mean."""
    columns = _columns(found)
    # A metric that its task alone has in the table needs no name.
    header = ["run", "method", "bits/weight", *(task if metric != "KL" else f"{task}, KL" for task, metric in columns)]
    cells = {(figure.run, figure.task, figure.metric): _cell(figure) for figure in found}
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    for each in (base, *(other for other in runs if other is not base)):
        bits = each.content.get("bits_per_weight")
        facts = [each.name, each.content.get("method", ""), "" if bits is None else f"{bits:.2f}"]
        lines.append([*facts, *(cells.get((each.name, *column), "") for column in columns)])
    metrics = [f"{task} {metric}" for task, metric in columns if metric not in _SHOWN]
    notes = ["± is one standard error"]
    if any(metric in _SHOWN for _, metric in columns):
        notes.append("texts have their perplexity, and KL in nats per token")
    if metrics:
        notes.append(f"tasks: {', '.join(metrics)}")
    if any(figure.delta is not None for figure in found):
        notes.append(
            f"in parentheses the difference from {base.name}, ≈ if it is less than {SIGNIFICANT:g} of its errors"
        )
    apart = [f"{f.task} of {f.run}" for f in found if (f.task, f.metric) in columns and _is_apart(f, base)]
    if apart:
        notes.append(f"not to be compared with {base.name}, being of other tokens or questions: {', '.join(apart)}")
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{rows}\n\n{'; '.join(notes)}.\n"


def _is_apart(figure: Figure, base: Collected) -> bool:
    """Whether a run was measured on other tokens or questions than the base. A KL has its base within itself."""
    return figure.run != base.name and figure.metric != "KL" and figure.delta is None and figure.task in base.results


def _columns(found: Sequence[Figure]) -> list[tuple[str, str]]:
    """The task and metric of each column: of a task, the first metric that any run has."""
    columns: dict[tuple[str, str], None] = {}
    for figure in found:
        others = [metric for task, metric in columns if task == figure.task]
        if figure.metric in _SHOWN or not others:
            columns[figure.task, figure.metric] = None
    return list(columns)


def _cell(figure: Figure) -> str:
    digits = _DIGITS.get(figure.metric, 4)
    text = f"{figure.value:.{digits}f}"
    if figure.error is not None:
        text += f" ± {figure.error:.{digits}f}"
    if figure.delta is not None:
        error = "" if figure.delta_error is None else f" ± {figure.delta_error:.{digits}f}"
        text += f" ({'≈' if figure.within_error else ''}{figure.delta:+.{digits}f}{error})"
    return text


def _csv(runs: Sequence[Collected], found: Sequence[Figure]) -> str:
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    facts = {each.name: [each.content.get(name) for name in ("model", "method", "bits_per_weight")] for each in runs}
    rows.writerow(
        ["run", "model", "method", "bits_per_weight", "task", "metric", "value", "error", "delta", "delta_error"]
        + ["within_error"]
    )
    for figure in found:
        delta = [figure.delta, figure.delta_error, None if figure.delta is None else int(figure.within_error)]
        rows.writerow([figure.run, *facts[figure.run], figure.task, figure.metric, figure.value, figure.error, *delta])
    return file.getvalue()
