"""Published tables of quantization papers, row by row: how each was measured, and the values that it has.

The values are those of the papers and of the READMEs beside their code; published.json holds them. The settings are
theirs as far as this library has them, and each row tells what is different.
"""

import copy
import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from any4_jax.evaluation.corpora import CORPORA, Corpus
from any4_jax.methods.spec import method_from_json


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that a row is of.

    Attributes:
      hub: its name on the Hugging Face hub.
      layers, hidden, vocabulary: its shape, by which another model is told from it.
    """

    hub: str
    layers: int
    hidden: int
    vocabulary: int

    def is_like(self, config: Any) -> bool:
        """Whether a model of this config has the same shape."""
        shape = config.num_hidden_layers, config.hidden_size, config.vocab_size
        return shape == (self.layers, self.hidden, self.vocabulary)


@dataclasses.dataclass(frozen=True)
class Source:
    """What a method learned from: so many samples of a corpus, of so many tokens each."""

    corpus: Corpus
    samples: int
    seqlen: int


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a published table.

    Attributes:
      name: TABLE/ROW.
      source: where it was published.
      subject: the model.
      method: in JSON, as a manifest holds it; None for the float model.
      rules: pairs of a regex and the fields of the method that are different where it matches.
      cache: the name and fields of the cache; None for a dense one.
      learns: what method or cache learn from; "prompt" is a short text; None for those that learn nothing.
      windows: how many windows of a text were measured, where that isn't as its corpus has it.
      notes: what is different here.
      values: by task: perplexities of texts, percents of tasks.
      metrics: of each task.
      means: the tasks of each mean among the values.
    """

    name: str
    source: str
    subject: Subject
    method: Mapping[str, Any] | None
    rules: Sequence[tuple[str, Mapping[str, Any]]]
    cache: Mapping[str, Any] | None
    learns: Source | str | None
    windows: Mapping[str, int]
    notes: Sequence[str]
    values: Mapping[str, float]
    metrics: Mapping[str, str]
    means: Mapping[str, Sequence[str]]

    @property
    def texts(self) -> list[str]:
        """The texts with a perplexity."""
        return [task for task in self.values if task in CORPORA]

    @property
    def tasks(self) -> list[str]:
        """The other tasks, with those that only a mean tells of."""
        found = [each for task in self.values if task not in CORPORA for each in self.means.get(task, (task,))]
        return list(dict.fromkeys(found))

    def build(self) -> Any:
        """The method; None for the float model."""
        return method_from_json(self.method)

    def build_rules(self, paths: Sequence[str]) -> list[tuple[str, Any]]:
        """The rules, as `quantize_model` takes them, that match one of these paths of linears."""
        return [
            (pattern, method_from_json(_changed(self.method, fields)))
            for pattern, fields in self.rules
            if any(re.fullmatch(pattern, path) for path in paths)
        ]


def published_rows() -> dict[str, Row]:
    """All rows by name, in the order of their tables."""
    content = json.loads(files(__package__).joinpath("published.json").read_text(encoding="utf-8"))
    subjects = {name: Subject(**fields) for name, fields in content["models"].items()}
    sources: dict[str, Source | str] = {"prompt": "prompt"}
    sources |= {name: _source(**fields) for name, fields in content["calibration"].items()}
    found = {}
    for table in content["tables"]:
        for label, row in table["rows"].items():
            recipe = content["recipes"][row["recipe"]] | {
                key: row[key] for key in ("calibration", "notes") if key in row
            }
            name = f"{table['name']}/{label}"
            values = zip(table["tasks"], row["values"], strict=True)
            found[name] = Row(
                name=name,
                source=table["source"],
                subject=subjects[table["model"]],
                method=_changed(recipe.get("method"), row.get("fields", {})),
                rules=recipe.get("rules", ()),
                cache=_cache(recipe.get("cache"), row.get("fields", {})),
                learns=None if recipe.get("calibration") is None else sources[recipe["calibration"]],
                windows=table.get("windows", {}),
                notes=recipe.get("notes", ()),
                values={task: value for task, value in values if value is not None},
                metrics=content["metrics"],
                means=content["means"],
            )
    return found


def find_rows(name: str) -> list[Row]:
    """The row of this name, or those of the table or group of tables.

    Raises:
      ValueError: there is none.
    """
    rows = published_rows()
    found = [row for row in rows.values() if f"{row.name}/".startswith(f"{name.rstrip('/')}/")]
    if not found:
        groups = {row[:end] for row in rows for end, letter in enumerate(row) if letter == "/"}
        close = difflib.get_close_matches(name, sorted({*rows, *groups}), 3, 0.5) or ["any4", "qllm-infer", "llm-fp4"]
        raise ValueError(f"no published table or row is named {name!r}; did you mean {' or '.join(close)}?")
    return found


def _source(corpus: Mapping[str, Any], samples: int, seqlen: int) -> Source:
    found = Corpus(**corpus)
    # No more of a data set is fetched than is read.
    return Source(dataclasses.replace(found, windows=samples if found.rule == "documents" else None), samples, seqlen)


def _cache(cache: Mapping[str, Any] | None, fields: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return None if cache is None else {"name": cache["name"], "fields": cache["fields"] | fields}


def _changed(spec: Mapping[str, Any] | None, fields: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A method in JSON with other values of these fields; a mapping of fields changes those of an inner method."""
    if spec is None:
        return None
    changed = copy.deepcopy(dict(spec))
    for name, value in fields.items():
        inner = isinstance(value, Mapping)
        changed["fields"][name] = _changed(changed["fields"][name], value) if inner else value
    return changed
