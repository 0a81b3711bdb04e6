"""Statistics in a file, so that a model is calibrated once and quantized often.

The file is in the safetensors format, which other tools read too. Its arrays are those of the accumulators, named
"<number of the input>.<number of the statistic>.<number of the array>". Its metadata hold

    statistics    JSON: for each input, the paths of the linears that read it, K, the experts' axes, and its statistics
                  by name and fields, in the order of their numbers
    sha256        hex digest of that text and of the arrays' bytes, in the order of their names
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from pydantic import Field

from any4_jax.one_line import one_line
from any4_jax.regular_file import check_regular
from any4_jax.schema import Count, Name, Schema, check, read_json
from any4_jax.statistics.drift import Drift
from any4_jax.statistics.gathered import Gathered, Statistic
from any4_jax.statistics.hessian import Hessian
from any4_jax.statistics.largest import Largest
from any4_jax.statistics.moments import AbsMax, Moments
from any4_jax.statistics.sample import Sample
from any4_jax.whole_file import write_whole

CATALOGUE: dict[str, Any] = {kind.__name__: kind for kind in (Moments, AbsMax, Hessian, Sample, Largest, Drift)}
"""The statistics that files may hold, by name; add one of your own: `CATALOGUE["Least"] = Least`."""

_ADVICE = "calibrate again"


class _Statistic(Schema):
    name: Name
    fields: dict[str, bool | int | float | str | None]


class _Input(Schema):
    linears: Annotated[tuple[str, ...], Field(min_length=1)]
    k: Count
    stack: tuple[Count, ...]
    statistics: tuple[_Statistic, ...]


class _Description(Schema):
    inputs: tuple[_Input, ...]


def save(file: str | os.PathLike[str], stats: Mapping[str, Gathered]) -> None:
    """Writes statistics of the inputs of linears, such as `any4_jax.calibrate` returns, by the linears' paths.

    What linears share is written once.

    Raises:
      ValueError: there are none, or one is of a kind that is not in the `CATALOGUE`.
      OSError: the file can't be written.
    """
    if not stats:
        raise ValueError(f"got no statistics to write to {file}, need those of one linear at least; calibrate first")
    shared: dict[int, list[str]] = {}
    for path, gathered in stats.items():
        shared.setdefault(id(gathered), []).append(path)
    inputs, arrays = [], dict[str, np.ndarray]()
    for index, linears in enumerate(shared.values()):
        gathered = stats[linears[0]]
        kinds = tuple(_described(statistic) for statistic in gathered)
        inputs.append(_Input(linears=tuple(linears), k=gathered.k, stack=gathered.stack, statistics=kinds))
        for place, accumulator in enumerate(gathered.values()):
            for number, leaf in enumerate(jax.tree.leaves(accumulator)):
                arrays[f"{index}.{place}.{number}"] = np.asarray(leaf, order="C")
    text = _Description(inputs=tuple(inputs)).model_dump_json()
    write_whole(file, safetensors.numpy.save(arrays, {"statistics": text, "sha256": _digest(text, arrays)}))


def load(file: str | os.PathLike[str]) -> dict[str, Gathered]:
    """What `save` wrote, by the paths of the linears, for `quantize_model(model, method, stats=...)`.

    Raises:
      ValueError: the file is damaged or holds something else, or a statistic whose kind is not in the `CATALOGUE`.
      OSError: it can't be read.
    """
    length = check_regular(Path(file))
    try:
        with safetensors.safe_open(Path(file), framework="numpy") as opened:
            metadata = opened.metadata() or {}
            arrays = {name: np.asarray(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, TypeError) as error:
        raise ValueError(
            f"{file} of {length} bytes is no file of statistics, or is damaged ({one_line(error)}); {_ADVICE}"
        ) from error
    if "statistics" not in metadata:
        raise ValueError(f"{file} holds no statistics, and those of a model's inputs are needed; {_ADVICE}")
    text = metadata["statistics"]
    if metadata.get("sha256") != _digest(text, arrays):
        raise ValueError(f"{file} is not as it was written: its sha256 differs; {_ADVICE}")
    inputs = check(_Description, read_json(text, str(file), _ADVICE), str(file), _ADVICE).inputs
    found = {}
    for index, each in enumerate(inputs):
        accumulators = {}
        for place, one in enumerate(each.statistics):
            statistic, empty = _built(file, one, each.k)
            accumulators[statistic] = _accumulator(file, arrays, f"{index}.{place}", one.name, empty, each)
        found.update(dict.fromkeys(each.linears, Gathered(accumulators, each.k, each.stack)))
    return found


def _described(statistic: Any) -> _Statistic:
    name = type(statistic).__name__
    if CATALOGUE.get(name) is not type(statistic):
        raise ValueError(
            f"got statistics of the kind {name}, and files hold those of any4_jax.statistics.CATALOGUE; add it there"
        )
    fields = {field.name: getattr(statistic, field.name) for field in dataclasses.fields(statistic)}
    return _Statistic(name=name, fields=fields)


def _built(file: Any, described: _Statistic, k: int) -> tuple[Statistic, Any]:
    """A statistic, and the shapes of its accumulator for K = `k`."""
    kind = CATALOGUE.get(described.name)
    if kind is None:
        raise ValueError(
            f"{file} holds statistics of the kind {described.name}, which any4_jax.statistics.CATALOGUE lacks; import "
            "the module that adds it"
        )
    try:
        statistic = kind(**described.fields)
        return statistic, jax.eval_shape(lambda: statistic.empty(k))
    except (TypeError, ValueError, OverflowError, MemoryError) as error:
        raise ValueError(f"{file} holds {described.name} with other fields ({one_line(error)}); {_ADVICE}") from None


def _accumulator(file: Any, arrays: Mapping[str, np.ndarray], name: str, kind: str, empty: Any, of: _Input) -> Any:
    """The accumulator whose arrays have names that start with `name`, checked against the shapes of an empty one."""
    leaves, tree = jax.tree.flatten(empty)
    found = [arrays.get(f"{name}.{number}") for number in range(len(leaves))]
    for leaf, array in zip(leaves, found, strict=True):
        need = f"{leaf.dtype} {[*of.stack, *leaf.shape]}"
        got = "nothing" if array is None else f"{array.dtype} {[*array.shape]}"
        if got != need:
            raise ValueError(f"{file}: {kind} of {of.linears[0]} has {got} where {need} is needed; {_ADVICE}")
    return jax.tree.unflatten(tree, found)


def _digest(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(arrays[name].reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
