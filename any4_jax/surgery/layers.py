"""The work on layers, whatever model they come from: each is a float matrix, or a stack of them, and a path."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.methods import Method, quantize
from any4_jax.statistics import Statistics

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """The weight of a dense layer.

    Attributes:
      array: [*L, K, N] where `transposed`, as Flax keeps kernels, else [*L, N, K]; L are layers stacked for a scan.
      transposed: see `array`.
      by_name: whether only a rule of the caller's, which names it, has it quantized: it is no dense layer's.
    """

    array: jax.Array
    transposed: bool
    by_name: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(*L, N, K)."""
        shape = tuple(self.array.shape)
        return (*shape[:-2], *shape[:-3:-1]) if self.transposed else shape


class Finished(Protocol):
    """Where layers are kept that a run has quantized, for one that starts anew; called by several threads at once."""

    def get(self, path: str, key: str) -> Any | None:
        """The operator of the layer at `path`, where it was put under the same key."""
        ...

    def put(self, path: str, key: str, operator: Any) -> None:
        """Keeps an operator."""
        ...


def quantize_matrix(matrix: Matrix, method: Method, stats: Statistics | None, path: str) -> Any:
    """The operator [*L, N, K] of one layer; the matrices of a stack are quantized one by one, all with `stats`."""
    array = matrix.array
    if array.ndim <= 2:
        return quantize(array, method, stats, transposed=matrix.transposed, path=path)
    stack = array.shape[:-2]
    each = [
        quantize(one, method, stats, transposed=matrix.transposed, path=f"{path}[{i}]")
        for i, one in enumerate(array.reshape(-1, *array.shape[-2:]))
    ]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays).reshape(*stack, *arrays[0].shape), *each)


def quantize_layers(
    layers: Mapping[str, Matrix],
    methods: Mapping[str, Method],
    stats: Mapping[str, Statistics],
    progress: Progress | None,
    finished: Finished | None,
) -> dict[str, Any]:
    """The operators of all paths of `methods`; see `quantize_model` for the arguments.

    Two layers at a time on a CPU, whose solver loops keep one core each busy; one at a time elsewhere.
    """
    for path, method in methods.items():
        try:
            method.check(path in stats)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    done: dict[str, Any] = {}
    keys: dict[str, str] = {}

    def look(store: Finished, path: str) -> tuple[str, Any | None]:
        keys[path] = layer_key(layers[path], methods[path], stats.get(path))
        return path, store.get(path, keys[path])

    def work(path):
        operator = jax.block_until_ready(quantize_matrix(layers[path], methods[path], stats.get(path), path))
        if finished is not None:
            finished.put(path, keys[path], operator)
        return path, operator

    def count(path, operator):
        done[path] = operator
        if progress is not None:
            progress(len(done), len(methods), path)

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1) as pool:
        looked = [] if finished is None else pool.map(functools.partial(look, finished), methods)
        found = {path: operator for path, operator in looked if operator is not None}
        for path, operator in found.items():
            count(path, operator)
        rest = {path: method for path, method in methods.items() if path not in found}
        for paths in _one_of_each_first(layers, rest, stats):
            for path, operator in pool.map(work, paths):
                count(path, operator)
    return {path: done[path] for path in methods}


def _one_of_each_first(layers, methods, stats) -> tuple[list[str], list[str]]:
    """A layer for each program that will be compiled, then the others: two threads that meet the same program
    before it is compiled would both compile it."""
    programs: dict[tuple, str] = {}
    for path, method in methods.items():
        array = layers[path].array
        programs.setdefault((array.shape, str(array.dtype), method, path in stats), path)
    first = list(programs.values())
    return first, [path for path in methods if path not in first]


def layer_key(matrix: Matrix, method: Method, stats: Statistics | None) -> str:
    """What a quantized layer follows from: the hex sha256 of its weight and statistics (dtypes, shapes and bytes) and
    of its method's name and fields."""
    digest = hashlib.sha256(repr((method.name, method, matrix.transposed)).encode())
    for leaf in jax.tree.leaves((matrix.array, stats)):
        host = np.asarray(leaf, order="C")
        digest.update(repr((str(host.dtype), host.shape)).encode())
        digest.update(host.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
