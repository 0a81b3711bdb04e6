"""What `any4 eval` asks of lm-evaluation-harness: its flags, its tasks, and a table of the answers."""

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from any4_jax.cli.errors import CommandLineError, WorkError
from any4_jax.cli.numbers import count, natural
from any4_jax.cli.output import progress, table
from any4_jax.cli.runs import Run
from any4_jax.evaluation import CORPORA
from any4_jax.evaluation.harness import harness_model
from any4_jax.evaluation.harness_tasks import Tasks
from any4_jax.evaluation.scoring import BATCH_TOKENS


def add_harness(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    group = parser.add_argument_group("tasks of lm-evaluation-harness")
    group.add_argument("--limit", type=count, metavar="N", help="only the first N questions of each (default: all)")
    group.add_argument(
        "--shots", type=natural, metavar="N", help="examples before each question (default: as the task has it)"
    )
    group.add_argument(
        "--batch-tokens",
        type=count,
        default=BATCH_TOKENS,
        metavar="N",
        help="inputs are batched up to N tokens; more are faster on a GPU, and take more memory (default: "
        f"{BATCH_TOKENS})",
    )
    group.add_argument("--chat", action="store_true", help="ask by the model's chat template")
    group.add_argument("--task-folder", metavar="DIR", help="YAML files of tasks of your own")
    group.add_argument(
        "--allow-code",
        action="store_true",
        help="run the code that the model writes for humaneval and mbpp: without a network, with limits on time, "
        "memory and files, and with your rights to read files; on Linux",
    )


class Harness:
    """The tasks that a command line names.

    Attributes:
      tasks: their names, with those of the groups' tasks.
    """

    def __init__(self, args: argparse.Namespace, names: Sequence[str]) -> None:
        """See the class.

        Raises:
          WorkError: the harness is not installed.
          CommandLineError: it knows no such task.
          OSError: the folder of tasks is missing.
        """
        self._args = args
        try:
            self._known = Tasks(args.task_folder)
        except ImportError as error:
            close = difflib.get_close_matches(names[0], CORPORA, 1, 0.8)
            meant = f" (did you mean {close[0]}?)" if close else ""
            raise WorkError(f"{names[0]} is no text that any4 knows{meant}, and {error}") from error
        try:
            self.tasks = self._known.expand(names)
        except ValueError as error:
            raise CommandLineError(str(error)) from error

    def measure(self, tasks: Sequence[str], model: Any, cache: Any, kept: Run) -> None:
        """Asks the tasks one by one, and keeps each result at once."""
        args = self._args
        for task in tasks:
            with progress(task, "input") as bar:
                adapter = harness_model(model, cache=cache, batch_tokens=args.batch_tokens, progress=bar)
                kept.add(
                    task,
                    self._known.run(
                        adapter, task, limit=args.limit, shots=args.shots, chat=args.chat, allow_code=args.allow_code
                    ),
                )
            print(f"{task}: done", file=sys.stderr)


def metrics_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the metrics of each task, with the errors that the harness tells."""
    rows = []
    for task, result in found.items():
        for name, metric in result["metrics"].items():
            error = "" if metric["error"] is None else f"{metric['error']:.4f}"
            shots = "" if result["shots"] is None else str(result["shots"])
            rows.append([task, name, f"{metric['value']:.4f}", error, str(result["samples"]), shots])
    return table(["task", "metric", "value", "error", "questions", "shots"], rows)
