"""A kernel inside a program: what is known of it while the program turns it around, until a product reads it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax.product.lookup import lookup
from any4_jax.product.matmul import matmul
from any4_jax.weights import Layout, Slice, dequantize, is_operator, take

Group = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Stored:
    """A kernel whose axes have been permuted, merged or indexed, and not yet computed with.

    Attributes:
      path: where the kernel is in the model.
      weight: an operator [*L, N, K], or the float kernel itself.
      roles: the letter of each axis of the kernel, see `weights.Layout`; "?" where it isn't known yet. Axes are
        numbered as in the kernel, and keep their numbers when others are indexed away.
      sizes: the length of each axis, by its number.
      left: the axes that are left of the kernel, in its order.
      groups: for each axis of the present array, the axes of the kernel that are merged in it; () is an axis of
        length 1 that was added.
      dtype: that the array was cast to.
      taken: the indices by which axes were taken, by axis: an int, a traced int32 array, or None within a scan.
      added: the axes of index arrays, which the kernel didn't have.
    """

    path: str
    weight: Any
    roles: dict[int, str]
    sizes: dict[int, int]
    left: Group
    groups: tuple[Group, ...]
    dtype: Any
    taken: dict[int, Any] = dataclasses.field(default_factory=dict)
    added: frozenset[int] = frozenset()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the present array."""
        return tuple(map(self._length, self.groups))

    @property
    def coded(self) -> bool:
        """Whether the weight is an operator."""
        return is_operator(self.weight)

    @property
    def own(self) -> Group:
        """The axes that the kernel had at first."""
        return tuple(sorted({*self.left, *self.taken} - self.added))

    @property
    def picked(self) -> bool:
        """Whether it is some entries of a stack, or some rows of a table, by an array of indices."""
        return any(getattr(index, "ndim", 0) for index in self.taken.values())

    @property
    def stack(self) -> Group:
        """The axes that are left of L."""
        return tuple(axis for axis in self.left if self.roles[axis] == "L")

    @property
    def outputs(self) -> Group:
        """The axes of N."""
        return tuple(axis for axis in self.left if self.roles[axis] == "N")

    @property
    def inputs(self) -> Group:
        """The axes of K."""
        return tuple(axis for axis in self.left if self.roles[axis] == "K")

    def _length(self, group: Group) -> int:
        return math.prod(self.sizes[axis] for axis in group)

    def lengths(self, group: Group) -> tuple[int, ...]:
        """The lengths of some axes of the kernel."""
        return tuple(self.sizes[axis] for axis in group)

    def dense(self) -> jax.Array:
        """The present array."""
        kernel = self.weight
        if self.coded:
            letters = "".join(self.roles[axis] for axis in self.left)
            kernel = Layout(letters, self.lengths(self.left)).kernel(dequantize(kernel, self.dtype))
        flat = tuple(axis for group in self.groups for axis in group)
        return jnp.transpose(kernel, tuple(map(self.left.index, flat))).reshape(self.shape).astype(self.dtype)

    def regrouped(self, shape: Sequence[int]) -> "Stored | None":
        """The array in another shape; None if that splits an axis of the kernel."""
        flat = [axis for group in self.groups for axis in group]
        groups: list[Group] = []
        for size in shape:
            group: list[int] = []
            while self._length(tuple(group)) < size and flat:
                group.append(flat.pop(0))
            if self._length(tuple(group)) != size:
                return None
            groups.append(tuple(group))
        # What is left has length 1, and goes to any axis.
        groups = [*groups[:-1], (*groups[-1], *flat)] if groups else groups
        return None if flat and not groups else dataclasses.replace(self, groups=tuple(groups))

    def index(self, at: int, index: Any, keep: bool = False) -> "Stored | None":
        """One entry along an axis of the present array, which must be one axis of L; None if it isn't.

        Args:
          at: the axis of the present array.
          index: int, or int32 [] that may be traced.
          keep: whether an axis of length 1 stays in its place.
        """
        axis = self._only(at)
        if axis is None:
            return None
        groups = (*self.groups[:at], *([()] if keep else []), *self.groups[at + 1 :])
        if self.coded and self._at(axis) == 0:
            weight = take(self.weight, index)
        else:
            weight = jax.tree.map(
                lambda a: jax.lax.dynamic_index_in_dim(a, index, self._at(axis), keepdims=False), _unsliced(self.weight)
            )
        return self._without(axis, weight, groups, index)

    def opened(self) -> "tuple[Any, Any] | None":
        """(arrays with the first axis of the present array in front, a function from one entry of these to what is
        stored there), for a scan; None if that axis is not one of L."""
        axis = self._only(0)
        if axis is None:
            return None
        arrays = jax.tree.map(lambda a: jnp.moveaxis(a, self._at(axis), 0), _unsliced(self.weight))
        return arrays, lambda one: self._without(axis, one, self.groups[1:], None)

    def gathered(self, indices: jax.Array, mode: str = "clip") -> "Stored | None":
        """The entries at indices int32 [...] of the first axis, one of L; None if it isn't. Only these are copied.

        Indices beyond the axis are clipped, or give NaN in the mode "fill", for which arrays of floats are enough.
        """
        axis = self._only(0)
        if axis is None:
            return None
        at, count = self._at(axis), indices.ndim
        here = jnp.where(indices < 0, self.sizes[axis], indices) if mode == "fill" else indices
        weight = jax.tree.map(
            lambda a: jnp.moveaxis(jnp.take(a, here, at, mode=mode), range(at, at + count), range(count)),
            _unsliced(self.weight),
        )
        new = tuple(max(self.sizes) + 1 + i for i in range(count))
        gone = self._without(axis, weight, (*((one,) for one in new), *self.groups[1:]), indices)
        return dataclasses.replace(
            gone,
            left=(*new, *gone.left),
            roles=gone.roles | dict.fromkeys(new, "L"),
            sizes=gone.sizes | dict(zip(new, indices.shape, strict=True)),
            added=gone.added | set(new),
        )

    def rows(self, indices: jax.Array) -> jax.Array | None:
        """The rows at indices of a table [N, K], decoded; None if this is none."""
        if not self.coded or self.groups != (self.outputs, self.inputs) or len(self.outputs) != 1:
            return None
        return lookup(self.weight, indices, self.dtype)

    def times(self, x: jax.Array, batch: Group, dtype: Any) -> jax.Array:
        """The product with x [*batch, M, K] of a coded weight: [*L, M, N].

        Args:
          x: as above, with the axes of `batch` in the order of the stack.
          batch: those axes of L along which x has entries of its own.
          dtype: that it is computed in.
        """
        call: Callable[..., jax.Array] = matmul
        for axis in reversed(self.stack):
            call = jax.vmap(call, (0 if axis in batch else None, 0))
        return call(x.astype(dtype), _unsliced(self.weight) if self.stack else self.weight)

    def _at(self, axis: int) -> int:
        """Where the arrays of the weight have an axis of L."""
        return self.stack.index(axis) if self.coded else self.left.index(axis)

    def _only(self, at: int) -> int | None:
        group = self.groups[at]
        return group[0] if len(group) == 1 and self.roles[group[0]] in "L?" else None

    def _without(self, axis: int, weight: Any, groups: tuple[Group, ...], index: Any) -> "Stored":
        left = tuple(other for other in self.left if other != axis)
        taken = self.taken | {axis: index}
        return dataclasses.replace(self, weight=weight, left=left, groups=groups, taken=taken)


def _unsliced(weight: Any) -> Any:
    """A weight whose arrays all have the axes that are left of L."""
    return jax.tree.map(lambda node: node.matrix() if _is_slice(node) else node, weight, is_leaf=_is_slice)


def _is_slice(node: Any) -> bool:
    return isinstance(node, Slice)


def stored(path: str, weight: Any, layout: Layout) -> Stored:
    """A kernel as a program finds it: an operator [*L, N, K], or the float kernel."""
    axes = tuple(range(len(layout.dims)))
    roles, sizes = dict(enumerate(layout.roles)), dict(enumerate(layout.dims))
    return Stored(path, weight, roles, sizes, axes, tuple((axis,) for axis in axes), jnp.dtype(layout.dtype))
