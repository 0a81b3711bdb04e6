"""A folder of results: results.json grows task by task, args.json says with what settings they were measured.

A run that was killed leaves whole files: what it had measured isn't measured again.
"""

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from any4_jax.cli.errors import WorkError
from any4_jax.cli.output import as_json
from any4_jax.cli.sources import is_checkpoint
from any4_jax.methods import CATALOGUE
from any4_jax.surgery import Recipe, quantized_leaves
from any4_jax.whole_file import check_target, write_whole

MANIFEST = "any4.json"
RESULTS, ARGS = "results.json", "args.json"
SCHEMA = 1
FACTS = ("method", "bits_per_weight", "quantized_bytes")


class Run:
    """Results by task, written as they come: to a folder, to one file whose name ends in .json, or nowhere.

    Attributes:
      results: those of this run, and in a folder those that were there before.
      facts: what is to be told of the model beside them.
    """

    def __init__(self, out: str | None, settings: Mapping[str, Any], command: str, again: bool) -> None:
        """See the class.

        Args:
          out: the folder or file, or None.
          settings: what results depend on; a folder whose args.json has others is refused.
          command: the command line.
          again: measure anew what a folder has.

        Raises:
          OSError: it can't be written.
          WorkError: the folder holds results of other settings, or what isn't such a folder's.
        """
        self._settings, self._command, self._anew = dict(settings), command, set[str]()
        self.facts: dict[str, Any] = {}
        self.results: dict[str, Any] = {}
        self._folder = Path(out) if out is not None and not out.endswith(".json") else None
        self._file = None if out is None else self._folder / RESULTS if self._folder is not None else Path(out)
        if self._folder is None:
            if self._file is not None:
                check_target(self._file)
            return
        if not self._folder.is_dir():
            above = next(parent for parent in self._folder.absolute().parents if parent.exists())
            check_target(self._folder if self._folder.exists() else above / RESULTS)
            return
        check_target(self._folder / RESULTS)
        before = _read(self._folder / ARGS)
        if before is None:
            # A run that was killed may leave the beginning of a file, whose name is hidden.
            if any(not path.name.startswith(".") for path in self._folder.iterdir()):
                raise WorkError(f"{out} is not empty and holds no {ARGS}; give a new folder, or one of an earlier eval")
            return
        self._refuse_others(before.get("settings"))
        found = _read(self._folder / RESULTS)
        results = {} if found is None else found.get("results")
        if not isinstance(results, dict):
            raise WorkError(f"{self._folder / RESULTS} has no results; remove it to measure anew")
        self.results = results
        self._anew = set(results) if again else set()
        self.facts = {name: found[name] for name in FACTS if found is not None and name in found}

    def has(self, task: str) -> bool:
        """Whether a task was measured before; says so on stderr."""
        if task not in self.results or task in self._anew:
            return False
        print(f"{task}: measured before, see {self._file}; --again measures it anew", file=sys.stderr)
        return True

    def add(self, task: str, result: Mapping[str, Any]) -> None:
        """Keeps a result, and writes all."""
        self.results[task] = result
        if self._file is None:
            return
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / ARGS, as_json(self._args()) + "\n")
        write_whole(self._file, as_json(self.content()) + "\n")

    def content(self) -> dict[str, Any]:
        """What results.json holds."""
        given = {name: value for name, value in self._settings.items() if value is not None}
        return {"schema": SCHEMA} | given | self.facts | {"results": self.results}

    def _args(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "command": self._command,
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "versions": {name: version(name) for name in ("any4_jax", "jax", "jaxlib")},
            "settings": self._settings,
        }

    def _refuse_others(self, before: Any) -> None:
        before = before if isinstance(before, dict) else {}
        # As JSON, because that is what was read.
        now = json.loads(as_json(self._settings))
        for name in dict.fromkeys([*now, *before]):
            if now.get(name) != before.get(name):
                raise WorkError(
                    f"{self._folder} holds results with {name} {_short(before.get(name))}, and this run has "
                    f"{_short(now.get(name))}; give another folder"
                )


def fingerprint(model: str) -> str | None:
    """What tells a checkpoint from another at the same path: the hash of its manifest; None for other models."""
    return hashlib.sha256((Path(model) / MANIFEST).read_bytes()).hexdigest() if is_checkpoint(model) else None


def facts_of(model: Any) -> dict[str, Any]:
    """What tables tell of a model: its method, and what its quantized layers take."""
    leaves = quantized_leaves(model)
    if not leaves:
        return {"method": "float"}
    recipe = model.recipe or Recipe((), ())
    stored, weights = (
        sum(leaf.nbytes for leaf in leaves.values()),
        sum(math.prod(leaf.shape) for leaf in leaves.values()),
    )
    names = sorted({_words(method) for _, method, _ in recipe.linears})
    # A method that trains what it quantizes is among the names.
    methods = {method.name for _, method, _ in recipe.linears}
    trained = dict.fromkeys(f"trained {each.by}" for each in recipe.training if each.by not in methods)
    return {
        "method": ", ".join([" + ".join(names), *trained]),
        "bits_per_weight": 8 * stored / weights,
        "quantized_bytes": stored,
    }


def _words(method: Any) -> str:
    """A method's name, with those of the methods that it holds: gptq(any4)."""
    held = (getattr(method, field.name) for field in dataclasses.fields(method))
    inner = [_words(each) for each in held if getattr(each, "name", None) in CATALOGUE]
    return f"{method.name}({', '.join(inner)})" if inner else method.name


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WorkError(f"{path} is not JSON ({error}); remove it to measure anew") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise WorkError(f"{path} was not written by any4 eval of this version; give another folder")
    return content


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
