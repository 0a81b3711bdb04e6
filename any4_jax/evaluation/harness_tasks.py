"""Tasks of lm-evaluation-harness, one by one or by the names of groups that published tables have."""

import contextlib
import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from any4_jax.evaluation.code_runs import pass_at_k

GROUPS: Mapping[str, tuple[str, ...]] = {
    "csqa": ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
    "math-500": ("minerva_math500",),
    "truthfulqa": ("truthfulqa_mc1", "truthfulqa_mc2", "truthfulqa_gen"),
}
"""Names for several tasks, or for one that the harness calls otherwise. Its own names and groups (mmlu, gsm8k, bbh,
humaneval, mbpp, ...) need no entry."""

_LOGGERS = ("lm_eval", "datasets", "evaluate")
_SPLIT = "_stderr"
_UNSAFE = "unsafe"
"""A word of the sentences with which tasks are refused that run generated code."""


class Tasks:
    """The tasks that the harness knows, with those of a folder of one's own."""

    def __init__(self, folder: str | Path | None = None) -> None:
        """See the class.

        Args:
          folder: holds YAML files of tasks, as the harness takes them with --include_path; None for none.

        Raises:
          ImportError: lm_eval is not installed.
          OSError: there is no such folder.
        """
        if folder is not None and not Path(folder).is_dir():
            raise OSError(f"{folder} is no folder, and one with YAML files of tasks is needed; create it")
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ImportError(
                f"tasks need the package lm_eval, which isn't installed ({error}); run pip install 'any4_jax[eval]'"
            ) from error
        with _quiet():
            self._manager = TaskManager(include_path=None if folder is None else str(folder))

    def expand(self, names: Sequence[str]) -> list[str]:
        """The names of tasks and of the harness's groups, with those of GROUPS in place of their names.

        Raises:
          ValueError: there is no such task.
        """
        found = list(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))
        known = {*self._manager.all_tasks, *GROUPS}
        for name in found:
            if name not in known:
                close = difflib.get_close_matches(name, sorted(known), 3) or [*GROUPS, "mmlu", "gsm8k", "bbh"]
                raise ValueError(
                    f"got the task {name!r}, which the harness doesn't know; did you mean {' or '.join(close)}?"
                )
        return found

    def run(
        self,
        model: Any,
        task: str,
        *,
        limit: int | None = None,
        shots: int | None = None,
        chat: bool = False,
        allow_code: bool = False,
    ) -> dict[str, Any]:
        """Evaluates a model on a task, or on all tasks of one of the harness's groups.

        Args:
          model: see `harness.harness_model`.
          task: its name.
          limit: only the first so many questions of each task; None for all.
          shots: examples before each question; None for the task's own number.
          chat: whether to ask by the model's chat template.
          allow_code: whether code that the model writes may run, as `code_runs.passes` does it: with limits and without
            a network, but with this user's rights to read files.

        Returns:
          For JSON: "metrics", by name with "value", "error" (None where the harness has none) and "higher_is_better";
          "tasks", the same of each task of a group; "samples", "shots", "version" and "harness", its version.

        Raises:
          ValueError: the task runs generated code, and that isn't allowed.
          OSError: its data can't be had.
        """
        import lm_eval

        with _quiet(), _code(allow_code):
            try:
                found = lm_eval.simple_evaluate(
                    model=model,
                    tasks=[task],
                    task_manager=self._manager,
                    limit=limit,
                    num_fewshot=shots,
                    apply_chat_template=chat,
                    log_samples=False,
                    confirm_run_unsafe_code=allow_code,
                )
            except ValueError as error:
                if _UNSAFE in str(error):
                    raise ValueError(
                        f"{task} runs code that the model writes, which is refused by default; allow it (allow_code, "
                        "--allow-code) where no file is secret"
                    ) from error
                raise
            except (ConnectionError, OSError) as error:
                raise OSError(
                    f"the data of {task} can't be had ({type(error).__name__}); connect to the network, or give a "
                    "folder with tasks whose data is local"
                ) from error
        return result_of(task, found)


def result_of(task: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What `Tasks.run` returns, from what the harness returned."""
    groups, single = found.get("groups") or {}, found["results"]
    better = found.get("higher_is_better") or {}
    whole = groups.get(task) or single[task]
    parts = {name: _metrics(each, better.get(name) or {}) for name, each in single.items() if name != task}
    counts = found.get("n-samples") or {}
    shots = found.get("n-shot") or {}
    first = task if task in shots else next(iter(shots), None)
    return {
        "metrics": _metrics(whole, better.get(task) or {}),
        "tasks": parts,
        "samples": sum(each.get("effective", 0) for each in counts.values()),
        "shots": None if first is None else shots[first],
        "version": (found.get("versions") or {}).get(task),
        "harness": found.get("lm_eval_version"),
    }


def _metrics(values: Mapping[str, Any], better: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Metrics by name: "acc,none" is acc; what a filter made keeps its name, as in "exact_match,strict-match"."""
    found = {}
    for key, value in values.items():
        name, comma, kept = key.partition(",")
        if not comma or name.endswith(_SPLIT) or isinstance(value, str):
            continue
        error = values.get(f"{name}{_SPLIT},{kept}")
        found[name if kept == "none" else key] = {
            "value": float(value),
            "error": None if error is None or isinstance(error, str) else float(error),
            "higher_is_better": better.get(name),
        }
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """In the body, the harness says only what went wrong."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _CodeEval:
    """What the harness's tasks take for the metric "code_eval": programs run as `code_runs` does it, if at all."""

    def __init__(self, allowed: bool) -> None:
        self._allowed = allowed

    def compute(self, references: Any, predictions: Any, k: Any = (1,)) -> Any:
        if not self._allowed:
            raise ValueError(f"{_UNSAFE}: it runs generated code")
        return pass_at_k(references, predictions, k)


@contextlib.contextmanager
def _code(allowed: bool) -> Iterator[None]:
    """In the body, the metric that runs generated code is ours; that of `evaluate` is a script from the network."""
    try:
        import evaluate
    except ImportError:  # then no task can ask for it
        yield
        return
    load = evaluate.load

    def ours(path: str, *args: Any, **given: Any) -> Any:
        return _CodeEval(allowed) if path == "code_eval" else load(path, *args, **given)

    evaluate.load = ours
    try:
        yield
    finally:
        evaluate.load = load
