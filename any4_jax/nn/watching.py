"""Readers of programs that learn about kernels: which axes their products contract, and what enters the products."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax import statistics
from any4_jax.nn.interpret import Reader
from any4_jax.nn.reading import rows_of
from any4_jax.nn.stored import Stored
from any4_jax.statistics import Gathered


class Finding(Reader):
    """Finds out what the products contract.

    Attributes:
      roles: by path, a letter for each axis of the kernel as in `weights.Layout`, for each way in which products read
        it.
      others: by path, the operations that read the kernel as an array.
      tables: the paths of kernels whose rows are looked up.
    """

    def __init__(self) -> None:
        super().__init__()
        self.roles: dict[str, set[str]] = {}
        self.others: dict[str, set[str]] = {}
        self.tables: set[str] = set()

    def product(self, kernel: Stored, x: jax.Array, contracted: Any, batch: Any) -> None:
        inner = {axis for at in contracted[1] for axis in kernel.groups[at]}
        outer = {axis for at in batch[1] for axis in kernel.groups[at]}
        letters = {axis: "K" if axis in inner else "L" if axis in outer else "N" for axis in kernel.left}
        self._add(kernel, letters)

    def chosen(self, kernel: Stored, x: jax.Array, experts: jax.Array) -> None:
        # Rows [M, K] by matrices [E, K, N]: which of the two is K is seen by the lengths, and K comes first otherwise.
        one, *rest = (axis for group in kernel.groups for axis in group)
        inner = [axis for axis in rest if kernel.sizes[axis] == x.shape[-1]][:1]
        letters = {one: "L"} | {axis: "K" if axis in inner else "N" for axis in rest}
        self._add(kernel, letters)

    def _add(self, kernel: Stored, letters: dict[int, str]) -> None:
        # What was indexed away is an axis of a stack.
        told = "".join(letters.get(axis, "L") for axis in kernel.own)
        self.roles.setdefault(kernel.path, set()).add(told)

    def other(self, kernel: Stored, name: str) -> None:
        if kernel.picked:
            self.tables.add(kernel.path)
        else:
            self.others.setdefault(kernel.path, set()).add(name)


class Gathering(Reader):
    """Gathers statistics of what enters the products.

    Attributes:
      state: the statistics of each kernel to watch, by path; `stack` holds the lengths of the axes of L.
      mask: [B, T], zero for tokens that don't count, or None.
    """

    def __init__(self, state: Mapping[str, Gathered], mask: jax.Array | None = None) -> None:
        super().__init__()
        self.state, self.mask = dict(state), mask

    def product(self, kernel: Stored, x: jax.Array, contracted: Any, batch: Any) -> None:
        found = rows_of(kernel, x, contracted, batch) if kernel.path in self.state else None
        if found is None:
            return
        rows, shared = found
        gathered, stack = self.state[kernel.path], _stack_of(kernel)
        if not stack:
            self.state[kernel.path] = statistics.update(gathered, rows, self._counted(rows))
            return
        if len(stack) > 1:
            raise ValueError(
                f"{kernel.path}: got a product that numbers matrices by {len(stack)} axes, and statistics follow one; "
                "scan over the others, or quantize without statistics"
            )
        # A row of zeros is a token that was sent to another expert.
        reached = jnp.any(rows != 0, axis=-1)
        (axis,) = stack
        index: Any = kernel.taken.get(axis)
        if axis in kernel.left:
            routed = reached if shared else jnp.broadcast_to(reached, (kernel.sizes[axis], *reached.shape))
            self.state[kernel.path] = statistics.update(gathered, rows, None, routed)
        elif getattr(index, "ndim", 0):
            free = rows.ndim - 1 - index.ndim
            owner = jnp.broadcast_to(index.reshape(*index.shape, *[1] * free), rows.shape[:-1]).reshape(-1)
            self.chosen(kernel, rows.reshape(-1, rows.shape[-1]), owner)
        else:
            one = statistics.update(gathered.of_expert(index), rows, reached)
            new = jax.tree.map(
                lambda a, b: jnp.asarray(a).at[index].set(b), list(gathered.values()), list(one.values())
            )
            self.state[kernel.path] = Gathered(dict(zip(gathered, new, strict=True)), gathered.k, gathered.stack)

    def chosen(self, kernel: Stored, x: jax.Array, experts: jax.Array) -> None:
        if kernel.path in self.state:
            gathered = self.state[kernel.path]
            routed = jnp.arange(gathered.stack[0])[:, None] == experts
            self.state[kernel.path] = statistics.update(gathered, x, None, routed)

    def split(self, state: Gathered) -> tuple[Any, Callable[[Any], Any]]:
        names, k, stack = list(state), state.k, state.stack
        return list(state.values()), lambda arrays: Gathered(dict(zip(names, arrays, strict=True)), k, stack[1:])

    def _counted(self, rows: jax.Array) -> jax.Array | None:
        same = self.mask is not None and self.mask.shape == rows.shape[:-1]
        return jnp.asarray(self.mask).astype(bool) if same else None


def _stack_of(kernel: Stored) -> list[int]:
    """The axes of L that the statistics of a kernel have at this place: those of the kernel that no scan took."""
    scanned = [axis for axis, index in kernel.taken.items() if index is None]
    return [axis for axis in kernel.own if kernel.roles[axis] == "L" and axis not in scanned]


def empty(k: int, needs: tuple[Any, ...], stack: tuple[int, ...]) -> Gathered:
    """Statistics of no tokens, with the axes of L in front."""
    gathered = statistics.empty(k, needs)
    arrays = {s: jax.tree.map(lambda a: jnp.broadcast_to(a, (*stack, *jnp.shape(a))), a) for s, a in gathered.items()}
    return Gathered(arrays, k, stack)


def flattened(gathered: Gathered) -> Gathered:
    """The statistics with one axis for all matrices of a stack."""
    if len(gathered.stack) < 2:
        return gathered
    lead = len(gathered.stack)
    arrays = {s: jax.tree.map(lambda a: a.reshape(-1, *a.shape[lead:]), a) for s, a in gathered.items()}
    count = jax.tree.leaves(arrays)[0].shape[0]
    return Gathered(arrays, gathered.k, (count,))
