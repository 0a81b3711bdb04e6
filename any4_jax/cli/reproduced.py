"""What `any4 reproduce` does for a row of a published table: quantizes by its settings, measures, compares."""

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from any4_jax.cli.errors import CommandLineError, WorkError
from any4_jax.cli.eval_tasks import Harness
from any4_jax.cli.eval_texts import SEQLEN, measure, tokens_of
from any4_jax.cli.output import progress
from any4_jax.cli.runs import Run, facts_of
from any4_jax.cli.sources import calibration_text, is_checkpoint, open_model
from any4_jax.data import pieces
from any4_jax.evaluation import CORPORA, read_corpus
from any4_jax.evaluation.published import Row, Source
from any4_jax.evaluation.windows import resampled_error
from any4_jax.kv_cache import CATALOGUE, CacheFactory
from any4_jax.models import Decoder
from any4_jax.surgery import holders
from any4_jax.walk import calibrate_cache, quantize_model

NEEDS_CODE = ("humaneval", "mbpp")
"""Tasks that run what a model writes, which --allow-code allows."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure that was measured: perplexities of texts, percents of tasks.

    Attributes:
      task, metric: what it is of.
      value: itself.
      error: its standard error; None if unknown.
      published: the value of the table; None if it has none.
    """

    task: str
    metric: str
    value: float
    error: float | None
    published: float | None


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a row loses on a text against the float row of its table, in nats per token.

    Attributes:
      row, text: what it is of.
      value: as measured, window by window.
      error: its standard error; None for one window.
      published: the logarithm of the published perplexities' ratio; None if one of them isn't there.
    """

    row: str
    text: str
    value: float
    error: float | None
    published: float | None


def chosen_tasks(args: argparse.Namespace, rows: Sequence[Row], files: Mapping[str, str]) -> dict[str, list[str]]:
    """The texts and tasks of each row that the command line asks for, by the row's name.

    Raises:
      CommandLineError: --tasks names one that no row has, or that runs code without being allowed to.
    """
    known = dict.fromkeys(task for row in rows for task in [*row.texts, *row.tasks, *row.values])
    for task in args.tasks or ():
        if task not in known:
            raise CommandLineError(f"got the task {task}, which {args.name} lacks; it has {', '.join(known)}")
        if task in NEEDS_CODE and not args.allow_code:
            raise CommandLineError(
                f"got the task {task}, which runs code that the model writes; allow that by --allow-code where no file "
                "is secret, or leave it out"
            )
    return {row.name: _chosen(args, row, files) for row in rows}


def _chosen(args: argparse.Namespace, row: Row, files: Mapping[str, str]) -> list[str]:
    own = [*row.texts, *row.tasks]
    if args.tasks is not None:
        asked = [each for task in args.tasks for each in row.means.get(task, (task,))]
        return list(dict.fromkeys([*files, *(task for task in asked if task in own)]))
    return [*files] if files else [task for task in own if args.allow_code or task not in NEEDS_CODE]


class Measured:
    """The float model of the command line, and what is made of it and measured by the settings of rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        """See the class.

        Raises:
          WorkError: the model is quantized already, or has no tokenizer.
        """
        if is_checkpoint(args.model):
            raise WorkError(f"{args.model} is quantized already; give the float model that it was made from")
        self._args = args
        self._float = open_model(args.model)
        if self._float.tokenizer is None:
            raise WorkError(f"{args.model} has no tokenizer, and texts are measured; add its tokenizer.json")
        self._seqlen = min(SEQLEN, self._float.config.max_position_embeddings)

    def is_like(self, row: Row) -> bool:
        """Whether the model has the shape of the row's."""
        return row.subject.is_like(self._float.config)

    def notes(self, row: Row) -> list[str]:
        """What is different from what was published."""
        args, config, subject = self._args, self._float.config, row.subject
        notes = list(row.notes)
        if not self.is_like(row):
            notes.insert(
                0,
                f"{args.model} is another model ({config.num_hidden_layers} layers of {config.hidden_size}, where "
                f"{subject.hub} has {subject.layers} of {subject.hidden}), so the values are not comparable",
            )
        if self._seqlen < SEQLEN:
            notes.append(f"windows of {self._seqlen} tokens, which is the model's context; published, of {SEQLEN}")
        if args.windows is not None:
            notes.append(f"only {args.windows} window{'s' * (args.windows > 1)} of each text")
        if args.limit is not None:
            notes.append(f"only {args.limit} question{'s' * (args.limit > 1)} of each task")
        if args.calibrate is not None and row.learns is not None and args.calibrate != row.learns:
            notes.append(f"learned from {args.calibrate}; published, from {_said(row.learns)}")
        return notes

    def measure(self, row: Row, tasks: Sequence[str], files: Mapping[str, str], kept: Run) -> None:
        """Measures these tasks of a row, and keeps each result at once."""
        args, new = self._args, [task for task in tasks if not kept.has(task)]
        asked = [task for task in new if task not in CORPORA and task not in files]
        try:
            harness = Harness(args, asked) if asked else None
        except WorkError as error:
            raise WorkError(f"{error}, or leave it out: --tasks and --text name what to measure") from error
        if not new:
            return
        # All are read before the work, so that what is missing is told at once.
        texts = {task: self._tokens(row, task, files) for task in new if task not in asked}
        model, cache = self._made(row)
        kept.facts = facts_of(model)
        for task, tokens in texts.items():
            settings = dict(seqlen=self._seqlen, windows=self._windows(row, task), cache=cache)
            kept.add(task, measure(task, tokens, model, None, **settings))
        if harness is not None:
            harness.measure(harness.tasks, model, cache, kept)

    def _windows(self, row: Row, task: str) -> int | None:
        return self._args.windows or row.windows.get(task)

    def _tokens(self, row: Row, task: str, files: Mapping[str, str]) -> Any:
        given = vars(self._args) | {"windows": self._windows(row, task), "text": list(files.values())}
        return tokens_of(files.get(task, task), argparse.Namespace(**given), [self._float], self._seqlen)

    def _made(self, row: Row) -> tuple[Decoder, CacheFactory | None]:
        """The model as the row quantizes it, and its cache."""
        model, method = self._float, row.build()
        data, seqlen = self._data(row)
        if method is not None:
            rules = row.build_rules(list(holders(model)))
            print(f"{row.name}: quantizing", file=sys.stderr)
            with progress("quantize", "linear") as bar:
                model = quantize_model(model, method, data=data, rules=rules, seqlen=seqlen, progress=bar)
        if row.cache is None:
            return model, None
        cache = CATALOGUE[row.cache["name"]](**row.cache["fields"])
        if hasattr(cache, "calibrated"):
            with progress("calibrate the cache", "block") as bar:
                cache = calibrate_cache(model, cache, data, seqlen=seqlen, progress=bar)
        return model, cache

    def _data(self, row: Row) -> tuple[Any, int]:
        """What is learned from, and the longest piece in tokens; of a text of the command line as much as published."""
        source, context = row.learns, self._float.config.max_position_embeddings
        samples, seqlen = (source.samples, source.seqlen) if isinstance(source, Source) else (None, SEQLEN)
        seqlen = min(seqlen, context)
        if source is None:
            return None, seqlen
        if self._args.calibrate is not None or not isinstance(source, Source):
            text = calibration_text(self._args.calibrate or "prompt")
            ids = self._float.tokenizer.encode(text)
            return (text if samples is None or len(ids) < samples * seqlen else pieces(ids, samples, seqlen)), seqlen
        return self._sampled(source, seqlen), seqlen

    @functools.lru_cache(maxsize=1)  # noqa: B019 - the rows of a table learn from one source
    def _sampled(self, source: Source, seqlen: int) -> np.ndarray:
        """Samples of a corpus, int32 [samples, seqlen]."""
        try:
            tokens = read_corpus(
                source.corpus, self._float.tokenizer, seqlen, windows=source.samples, folder=self._args.datasets
            )
        except (ImportError, OSError) as error:
            raise WorkError(f"{error}; --calibrate names one to learn from") from error
        return pieces(tokens.ids, source.samples, seqlen)


def compared(row: Row, results: Mapping[str, Any]) -> list[Figure]:
    """The figures of results by task, with what is published of them; and the means whose tasks are all there."""
    found: dict[str, Figure] = {}
    for task, result in results.items():
        published = row.values.get(task)
        if "perplexity" in result:
            found[task] = Figure(task, "perplexity", result["perplexity"], result["standard_error"], published)
            continue
        metric = row.metrics[task]
        names = [name for name in result["metrics"] if name == metric or name.startswith(f"{metric},")]
        name = next(iter([*names, *result["metrics"]]))
        value, error = result["metrics"][name]["value"], result["metrics"][name]["error"]
        published = published if names else None
        found[task] = Figure(task, name, 100 * value, None if error is None else 100 * error, published)
    for mean, parts in row.means.items():
        if mean in row.values and all(part in found for part in parts):
            errors = [found[part].error for part in parts]
            error = None if None in errors else float(np.linalg.norm([each or 0 for each in errors])) / len(parts)
            value = sum(found[part].value for part in parts) / len(parts)
            found[mean] = Figure(mean, "mean acc", value, error, row.values[mean])
    return list(found.values())


def lost(row: Row, results: Mapping[str, Any], base: Row, of_base: Mapping[str, Any]) -> list[Loss]:
    """What a row loses against the float row of its table, on the texts that both measured."""
    found = []
    for task, result in results.items():
        other = of_base.get(task, {})
        if "perplexity" not in result or "perplexity" not in other:
            continue
        nats = np.asarray(result["window_nats_per_token"]) - np.asarray(other["window_nats_per_token"])
        both = task in row.values and task in base.values
        published = math.log(row.values[task] / base.values[task]) if both else None
        error = resampled_error(nats, 2000, 0) if len(nats) > 1 else None
        found.append(Loss(row.name, task, float(nats.mean()), error, published))
    return found


def _said(learns: Source | str) -> str:
    if isinstance(learns, str):
        return f"a {learns}"
    return f"{learns.samples} x {learns.seqlen} tokens of {learns.corpus.path}"
