"""Replace the dense layers of a model by quantized ones.

Models are Flax NNX modules (every nnx.Linear becomes an Any4Linear) or plain trees of arrays, where a matrix named
"kernel" is [K, N] as Flax keeps it and one named "weight" is [N, K] as torch does. The model that is passed in stays
as it was; the new one shares the arrays that were left alone.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from any4_jax.methods import Method, quantize
from any4_jax.nn.nnx import Any4Linear
from any4_jax.statistics import Statistics
from any4_jax.weights import is_operator

Rules = Sequence[tuple[str, Method | None]]
Progress = Callable[[int, int, str], None]

DEFAULT_RULES: Rules = ((r"(.*[./])?(lm_head|embed_tokens)([./].*)?", None),)
"""Always tried after the caller's: the head and the embedding stay as they are unless a rule names them."""


class Finished(Protocol):
    """Where layers are kept that a run has quantized, for one that starts anew; called by several threads at once."""

    def get(self, path: str, key: str) -> Any | None:
        """The operator of the layer at `path`, where it was put under the same key."""
        ...

    def put(self, path: str, key: str, operator: Any) -> None:
        """Keeps an operator."""
        ...


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model was quantized; static, hashable, written to the manifest.

    Attributes:
      rules: (regex, method or None) in the order they were tried, by the last call of `quantize_model`.
      layers: (path, method, notes) of every quantized layer; notes are (key, value) pairs.
    """

    rules: tuple[tuple[str, Method | None], ...]
    layers: tuple[tuple[str, Method, tuple[tuple[str, str], ...]], ...]


def resolve(paths: Iterable[str], method: Method | None, rules: Rules | None) -> dict[str, Method]:
    """The method of each path that is to be quantized.

    Rules are tried in order: the caller's, DEFAULT_RULES, then `method` for the rest; the first whose regex matches
    the whole path decides, and None leaves the layer alone.

    Raises:
      ValueError: a caller's rule that matches no path, or a regex that doesn't compile.
    """
    paths = list(paths)
    compiled = []
    for pattern, chosen in rules or ():
        try:
            compiled.append((re.compile(pattern), chosen))
        except re.error as error:
            raise ValueError(f"got rule {pattern!r}, which is no regular expression ({error}); mend it") from None
        if not any(compiled[-1][0].fullmatch(path) for path in paths):
            raise ValueError(
                f"rule {pattern!r} matches none of the {len(paths)} linear layers (the first is "
                f"{paths[0] if paths else 'absent'!r}); a rule must match a whole path"
            )
    compiled += [(re.compile(pattern), chosen) for pattern, chosen in (*DEFAULT_RULES, (r".*", method))]
    resolved = {}
    for path in paths:
        chosen = next(chosen for pattern, chosen in compiled if pattern.fullmatch(path))
        if chosen is not None:
            resolved[path] = chosen
    return resolved


def quantize_model(
    model: Any,
    method: Method | None,
    *,
    stats: Mapping[str, Statistics] | None = None,
    rules: Rules | None = None,
    progress: Progress | None = None,
    finished: Finished | None = None,
) -> Any:
    """The model with its dense layers quantized.

    Args:
      model: an NNX module, or a tree of arrays (dicts and lists).
      method: for the layers that no rule decides; None leaves these alone.
      stats: statistics of the input of each layer by path, as `calibrate` returns them.
      rules: see `resolve`.
      progress: called with (done, total, path) after each layer.
      finished: where each layer is kept as soon as it is done, and looked for before any is computed; layers that it
        holds under their `layer_key` are taken from there. None keeps nothing.

    Returns:
      A new module or tree.

    Raises:
      ValueError: no layer to quantize, a rule that matched nothing, a method that needs statistics where none are
        given for the path, weights that are not finite.
    """
    is_module = isinstance(model, nnx.Module)
    layers = linears(model) if is_module else _matrices(model)
    chosen = resolve(layers, method, rules)
    if not chosen:
        raise ValueError(
            f"found {len(layers)} linear layers and the rules leave all of them alone; name one to quantize"
        )
    stats = stats or {}
    done = _quantize_all({path: layers[path] for path in chosen}, chosen, stats, progress, finished)
    earlier = getattr(model, "recipe", None)
    recipe = Recipe(
        rules=tuple((p, m) for p, m in (*(rules or ()), *DEFAULT_RULES, (r".*", method))),
        layers=(earlier.layers if isinstance(earlier, Recipe) else ())
        + tuple((p, m, tuple(sorted(m.notes(p in stats).items()))) for p, m in chosen.items()),
    )
    return _with_modules(model, done, recipe) if is_module else _with_leaves(model, done)


def _quantize_all(layers, chosen, stats, progress, finished) -> dict[str, Any]:
    """Two layers at a time on a CPU, whose solver loops keep one core each busy; one at a time elsewhere."""
    for path, method in chosen.items():
        try:
            method.check(path in stats)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    done: dict[str, Any] = {}
    keys: dict[str, str] = {}

    def look(path):
        keys[path] = layer_key(layers[path], chosen[path], stats.get(path))
        return path, finished.get(path, keys[path])

    def work(path):
        layer = quantize_layer(layers[path], chosen[path], stats.get(path), path)
        if finished is not None:
            finished.put(path, keys[path], layer.weight if isinstance(layer, Any4Linear) else layer)
        return path, layer

    def count(path, layer):
        done[path] = layer
        if progress is not None:
            progress(len(done), len(chosen), path)

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1) as pool:
        found = {} if finished is None else {path: op for path, op in pool.map(look, chosen) if op is not None}
        for path, operator in found.items():
            count(path, _around(layers[path], operator))
        rest = {path: method for path, method in chosen.items() if path not in found}
        for paths in _one_of_each_first(layers, rest, stats):
            for path, layer in pool.map(work, paths):
                count(path, layer)
    return {path: done[path] for path in chosen}


def _one_of_each_first(layers, chosen, stats) -> tuple[list[str], list[str]]:
    """A layer for each program that will be compiled, then the others: two threads that meet the same program
    before it is compiled would both compile it."""
    programs: dict[tuple, str] = {}
    for path, method in chosen.items():
        array = layers[path].kernel if isinstance(layers[path], nnx.Linear) else layers[path]
        programs.setdefault((array.shape, str(array.dtype), method, path in stats), path)
    first = list(programs.values())
    return first, [path for path in chosen if path not in first]


def quantize_layer(layer: Any, method: Method, stats: Statistics | None, path: str) -> Any:
    """The quantized counterpart of one layer: Any4Linear for an nnx.Linear, an operator for a matrix of a tree."""
    if not isinstance(layer, nnx.Linear):
        return quantize(layer, method, stats, transposed=path.rsplit(".", 1)[-1] == "kernel", path=path)
    weight = quantize(layer.kernel[...], method, stats, transposed=True, path=path)
    jax.block_until_ready(weight)
    return _around(layer, weight)


def _around(layer: Any, weight: Any) -> Any:
    """What takes the place of `layer` once its matrix is the operator `weight`."""
    if not isinstance(layer, nnx.Linear):
        return weight
    bias = None if layer.bias is None else layer.bias[...]
    return Any4Linear(weight, bias=bias, dtype=layer.dtype)


def layer_key(layer: Any, method: Method, stats: Statistics | None) -> str:
    """What a quantized layer follows from: the hex sha256 of its weight and statistics (dtypes, shapes and bytes) and
    of its method's name and fields."""
    digest = hashlib.sha256(repr((method.name, method)).encode())
    for leaf in jax.tree.leaves((layer.kernel[...] if isinstance(layer, nnx.Linear) else layer, stats)):
        host = np.asarray(leaf, order="C")
        digest.update(repr((str(host.dtype), host.shape)).encode())
        digest.update(host.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def linears(model: nnx.Module) -> dict[str, nnx.Linear]:
    """The dense layers of an NNX module by dotted path."""
    return {_dotted(path): node for path, node in nnx.iter_modules(model) if isinstance(node, nnx.Linear)}


def quantized_leaves(model: Any) -> dict[str, Any]:
    """The operators of a quantized module or tree by dotted path."""
    if isinstance(model, nnx.Module):
        found = [(p, m) for p, m in nnx.iter_modules(model) if isinstance(m, Any4Linear)]
        return {_dotted(path): layer.weight for path, layer in found}
    flat = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_operator)
    return {_dotted(path): leaf for path, leaf in flat if is_operator(leaf)}


def replace_module(model: nnx.Module, path: str, new: nnx.Module) -> None:
    """Puts `new` in the place of the submodule at a dotted path, in place."""
    *parents, last = path.split(".")
    node: Any = model
    for name in parents:
        node = node[int(name)] if name.isdigit() else getattr(node, name)
    if last.isdigit():
        node[int(last)] = new
    else:
        setattr(node, last, new)


def copy_module(model: nnx.Module) -> nnx.Module:
    """A module with variables of its own over the same arrays."""
    return nnx.clone(model)


def _dotted(path: tuple) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def _matrices(tree) -> dict[str, jax.Array]:
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_operator)
    named = {_dotted(path): leaf for path, leaf in flat if not is_operator(leaf)}
    return {
        path: leaf
        for path, leaf in named.items()
        if path.rsplit(".", 1)[-1] in ("kernel", "weight") and getattr(leaf, "ndim", 0) == 2
    }


def _with_modules(model: nnx.Module, done: dict[str, Any], recipe: Recipe) -> nnx.Module:
    new: Any = copy_module(model)
    for path, layer in done.items():
        replace_module(new, path, layer)
    new.recipe = recipe
    return new


def _with_leaves(tree, done: dict[str, Any]):
    def swap(path, leaf):
        return done.get(_dotted(path), leaf)

    return jax.tree_util.tree_map_with_path(swap, tree, is_leaf=is_operator)
