"""The figures of several runs of `any4 eval`, each with its difference from one of them and the error of that."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from any4_jax.cli.errors import WorkError
from any4_jax.cli.runs import RESULTS, SCHEMA
from any4_jax.evaluation.harness_tasks import GROUPS

SIGNIFICANT = 2.0
"""Standard errors within which a difference is none that one may speak of."""
_RESAMPLINGS = 2000
_AVERAGED = "csqa"


@dataclasses.dataclass(frozen=True)
class Collected:
    """What a results.json holds.

    Attributes:
      name: tells the run from the others.
      content: of the file.
      folder: where the file is, or the file itself if it is none of any4's own name.
    """

    name: str
    content: Mapping[str, Any]
    folder: Path = Path()

    @property
    def results(self) -> Mapping[str, Any]:
        """The results by task."""
        return self.content["results"]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of a run.

    Attributes:
      run, task, metric: whose it is.
      value: itself.
      error: its standard error; None if unknown.
      delta: the value less that of the base run; None in the base run, and where the two aren't of the same questions
        or tokens.
      delta_error: the standard error of that, for perplexity from the windows that both share, for tasks as if the
        questions were others, which is more than it is; None if unknown.
    """

    run: str
    task: str
    metric: str
    value: float
    error: float | None
    delta: float | None = None
    delta_error: float | None = None

    @property
    def within_error(self) -> bool:
        """Whether the difference may be chance: it is small, or its error unknown."""
        if self.delta is None:
            return False
        return self.delta_error is None or abs(self.delta) <= SIGNIFICANT * self.delta_error


def collect(paths: Sequence[str]) -> list[Collected]:
    """The runs in these folders and below, or in these files, in the order of their paths.

    Raises:
      OSError: a folder or file is missing.
      WorkError: one holds no results, or what isn't a result.
    """
    files: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise OSError(f"{path} is missing, and a folder of results is needed; give one that any4 eval --out wrote")
        found = sorted(path.rglob(RESULTS)) if path.is_dir() else [path]
        if not found:
            raise WorkError(f"{path} holds no {RESULTS}; give a folder that any4 eval --out wrote, or one above such")
        files |= dict.fromkeys(found)
    contents = {file: _read(file) for file in files}
    folders = [(file.parent if file.name == RESULTS else file).resolve() for file in contents]
    names = [folder.name.removesuffix(".json") for folder in folders]
    return [
        Collected(name if names.count(name) == 1 else str(folder), content, folder)
        for name, folder, content in zip(names, folders, contents.values(), strict=True)
    ]


def base_of(runs: Sequence[Collected], name: str | None) -> Collected:
    """The run that the others are compared with: the named one, or the first of a float model, or the first.

    Raises:
      WorkError: no run has this name.
    """
    if name is None:
        return next((run for run in runs if run.content.get("method") == "float"), runs[0])
    for run in runs:
        if name == run.name or Path(name).resolve() == run.folder:
            return run
    raise WorkError(f"no run is named {name}; give one of {', '.join(run.name for run in runs)}")


def figures(runs: Iterable[Collected], base: Collected) -> list[Figure]:
    """The figures of all runs, task by task."""
    found = []
    for run in runs:
        same = run is base
        for task, result in run.results.items():
            other = None if same else base.results.get(task)
            found += _of_text(run.name, task, result, other) if "perplexity" in result else []
            found += _of_task(run.name, task, result, other) if "metrics" in result else []
        found += _average(run, None if same else base)
    return found


def _of_text(run: str, task: str, result: Mapping[str, Any], base: Mapping[str, Any] | None) -> list[Figure]:
    delta: tuple[float | None, float | None] = (None, None)
    if base is not None and _tokens(base) == _tokens(result):
        delta = _paired(result["window_nats_per_token"], base["window_nats_per_token"])
    found = [Figure(run, task, "perplexity", result["perplexity"], result["standard_error"], *delta)]
    if "against" in result:
        against = result["against"]
        found.append(Figure(run, task, "KL", against["kl_nats_per_token"], against["kl_standard_error"]))
        found.append(Figure(run, task, "top-1 agreement", against["top1_agreement"], None))
        found.append(Figure(run, task, "flips", against["flips"], None))
    return found


def _of_task(run: str, task: str, result: Mapping[str, Any], base: Mapping[str, Any] | None) -> list[Figure]:
    found = []
    for name, metric in result["metrics"].items():
        other = None if base is None or _questions(base) != _questions(result) else base["metrics"].get(name)
        error = metric["error"]
        delta = (None, None) if other is None else (metric["value"] - other["value"], _both(error, other["error"]))
        found.append(Figure(run, task, name, metric["value"], error, *delta))
    return found


def _average(run: Collected, base: Collected | None) -> list[Figure]:
    """The mean accuracy over common-sense tasks, if a run has them all."""
    tasks = GROUPS[_AVERAGED]

    def mean(results: Mapping[str, Any]) -> tuple[float, float] | None:
        found = [results.get(task, {}).get("metrics", {}).get("acc") for task in tasks]
        if any(each is None for each in found):
            return None
        error = math.sqrt(sum((each["error"] or 0.0) ** 2 for each in found)) / len(found)
        return sum(each["value"] for each in found) / len(found), error

    own = mean(run.results)
    if own is None:
        return []
    other = None if base is None else mean(base.results)
    same = base is not None and all(_questions(base.results.get(t, {})) == _questions(run.results[t]) for t in tasks)
    delta = (own[0] - other[0], _both(own[1], other[1])) if other is not None and same else (None, None)
    return [Figure(run.name, _AVERAGED, "mean acc", *own, *delta)]


def _tokens(result: Mapping[str, Any]) -> tuple[Any, ...]:
    return result.get("source", {}).get("tokens_sha256"), result.get("seqlen"), result.get("windows")


def _questions(result: Mapping[str, Any]) -> tuple[Any, ...]:
    return result.get("samples"), result.get("shots"), result.get("version")


def _both(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else math.hypot(first, second)


def _paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float | None]:
    """The difference of two perplexities, and its error from resamplings of the windows that they share."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    delta = float(np.exp(a.mean()) - np.exp(b.mean()))
    if len(a) == 1:
        return delta, None
    index = np.random.default_rng(0).integers(0, len(a), (_RESAMPLINGS, len(a)))
    return delta, float((np.exp(a[index].mean(axis=1)) - np.exp(b[index].mean(axis=1))).std())


def _read(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WorkError(f"{file} is not JSON ({error}); give results of any4 eval --out") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not isinstance(content.get("results"), dict):
        raise WorkError(f"{file} holds no results of this version's any4 eval --out; measure them again")
    return content
