"""Quantizing many matrices, each by its own method: work is shared among threads, and kept for a run that restarts."""

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.methods.apply import apply_method
from any4_jax.methods.base import AnyMethod, Method, Result
from any4_jax.statistics import Gathered
from any4_jax.weights import Layout, contraction, padded_alike

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """The weight of a linear.

    Attributes:
      array: [*L, K, N] if `transposed`, as Flax keeps kernels, else [*L, N, K]; L are blocks stacked for a scan, or
        experts.
      transposed: see `array`.
      by_name: whether it is quantized only if a caller's rule names it: an embedding.
      special: why an operator can't take its place in the model, in words; None if one can.
      layout: how the axes of `array`, a kernel of any rank, become those of a matrix; None if it is a matrix as it is.
    """

    array: jax.Array
    transposed: bool
    by_name: bool = False
    special: str | None = None
    layout: Layout | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(*L, N, K)."""
        if self.layout is not None:
            return self.layout.shape
        shape = tuple(self.array.shape)
        return (*shape[:-2], *shape[:-3:-1]) if self.transposed else shape

    def arranged(self) -> jax.Array:
        """The array as [*L, K, N] if `transposed`, else as [*L, N, K]."""
        return self.array if self.layout is None else self.layout.matrix(self.array)

    def held(self, operator: Any) -> Any:
        """An operator [*L, N, K] as the model holds it in the array's place."""
        return operator if self.layout is None else contraction(operator, self.layout)


@dataclasses.dataclass(frozen=True)
class Job:
    """A matrix to quantize.

    Attributes:
      matrix, method: what to quantize, and how.
      gathered: statistics of its input, or None.
      key: digest of all that determines the result, see `job_key`; "" where results are not kept.
    """

    matrix: Matrix
    method: Method
    gathered: Gathered | None = None
    key: str = ""


class Finished(Protocol):
    """Where results are kept for a run that restarts. Several threads call it at once."""

    def get(self, path: str, key: str) -> Result | None:
        """The result at `path`, if it was put there under the same key; else None."""
        ...

    def put(self, path: str, key: str, result: Result) -> None:
        """Keeps a result."""
        ...


def quantize_matrix(matrix: Matrix, method: Method, gathered: Gathered | None, path: str) -> Result:
    """The operator [*L, N, K] of one linear, and the method's notes.

    The matrices of a stack are quantized one by one: experts with the statistics of their own tokens, blocks all with
    the same statistics. Where a note differs among them, it becomes the tuple of all their values.

    Raises:
      ValueError, TypeError: as in `quantize`.
    """
    array = matrix.arranged()
    if array.ndim <= 2:
        return apply_method(array, method, gathered, transposed=matrix.transposed, path=path)
    stack = array.shape[:-2]
    each = []
    for i, one in enumerate(array.reshape(-1, *array.shape[-2:])):
        own = gathered.of_expert(i) if gathered is not None and gathered.stack else gathered
        each.append(apply_method(one, method, own, transposed=matrix.transposed, path=f"{path}[{i}]"))
    return stacked(each, stack)


def stacked(each: Sequence[Result], stack: tuple[int, ...]) -> Result:
    """The results of the matrices of a stack [*L, N, K], in sequence, as the one of the stack."""
    operator = jax.tree.map(
        lambda *arrays: jnp.stack(arrays).reshape(*stack, *arrays[0].shape),
        *padded_alike([one.operator for one in each]),
    )
    notes = {}
    for name in dict.fromkeys(name for one in each for name in one.notes):
        values = tuple(plain_note(one.notes.get(name)) for one in each)
        notes[name] = values[0] if len(set(values)) == 1 else values
    return Result(operator, notes)


def plain_note(note: Any) -> Any:
    """A note, traced once or read from JSON, as a plain Python number, string, bool or tuple of these.

    NaN and infinity, which JSON lacks, become strings.
    """
    if isinstance(note, jax.Array | np.ndarray | np.generic):
        note = np.asarray(note).tolist()
    if isinstance(note, float) and not math.isfinite(note):
        return str(note)
    return tuple(map(plain_note, note)) if isinstance(note, tuple | list) else note


def quantize_matrices(
    jobs: Mapping[str, Job], count: Callable[[str], None] | None = None, finished: Finished | None = None
) -> dict[str, Result]:
    """The results of all jobs, by path.

    Two matrices at a time on a CPU, where the serial parts of a solver leave a core idle; one at a time elsewhere.

    Args:
      jobs: the matrices to quantize, by path.
      count: called with a path as soon as its result is there.
      finished: where results are kept, under the jobs' keys.

    Raises:
      ValueError, TypeError: as in `quantize`.
    """
    done: dict[str, Result] = {}

    def work(path: str) -> tuple[str, Result]:
        job = jobs[path]
        result = jax.block_until_ready(quantize_matrix(job.matrix, job.method, job.gathered, path))
        if finished is not None:
            finished.put(path, job.key, result)
        return path, result

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1) as pool:
        for paths in _one_of_each_first(jobs):
            for path, result in pool.map(work, paths):
                done[path] = result
                if count is not None:
                    count(path)
    return {path: done[path] for path in jobs}


def _one_of_each_first(jobs: Mapping[str, Job]) -> tuple[list[str], list[str]]:
    """One matrix for each program that has to be compiled, then the others. Two threads that need the same program
    before it is compiled would both compile it."""
    programs: dict[tuple, str] = {}
    for path, job in jobs.items():
        array = job.matrix.array
        programs.setdefault((array.shape, str(array.dtype), job.method, jax.tree.structure(job.gathered)), path)
    first = list(programs.values())
    return first, [path for path in jobs if path not in first]


def job_key(matrix: Matrix, method: AnyMethod, gathered: Gathered | None) -> str:
    """The key of a result where statistics are given: the hex sha256 of all that determines it. That is the weight and
    the statistics (dtypes, shapes and bytes), and the method's name and fields."""
    laid = matrix.transposed if matrix.layout is None else matrix.layout
    digest = hashlib.sha256(repr((method.name, method, laid)).encode())
    digest.update(repr(None if gathered is None else tuple(gathered)).encode())
    digest_arrays(digest, (matrix.array, gathered))
    return digest.hexdigest()


def find_finished(keys: Mapping[str, str], finished: Finished) -> dict[str, Result]:
    """The results that are kept under these keys, by path."""
    with ThreadPoolExecutor(2) as pool:
        found = zip(keys, pool.map(finished.get, keys, keys.values()), strict=True)
        return {path: result for path, result in found if result is not None}


def digest_arrays(digest: Any, tree: Any) -> None:
    """Adds the dtypes, shapes and bytes of a tree's arrays to a hashlib digest."""
    for leaf in jax.tree.leaves(tree):
        host = np.asarray(leaf, order="C")
        digest.update(repr((str(host.dtype), host.shape)).encode())
        digest.update(host.reshape(-1).view(np.uint8).data)
