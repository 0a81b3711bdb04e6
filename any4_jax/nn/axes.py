"""Axis names for sharding: from those of a float kernel to those of each array of the operator that replaces it."""

from typing import Any

from flax.core import meta

from any4_jax.weights import places


def array_axes(axes: str, kernel: tuple, shape: tuple[int, ...]) -> tuple:
    """The names of an array's axes, one for each axis.

    An axis of length 1 (one table for all rows, one group) can't be split and gets None.

    Args:
      axes: what the array's axes run along, as in `any4_jax.weights.Place.axes`.
      kernel: the names of all axes of the float kernel [*L, K, N].
      shape: of the array.
    """
    *stack, k, n = kernel
    before, after = axes.split("*")
    names = {"N": n, "K": k, ".": None}

    def own(letters: str, sizes: tuple[int, ...]) -> list:
        return [None if size == 1 else names[letter] for letter, size in zip(letters, sizes, strict=True)]

    first = len(before)
    return (*own(before, shape[:first]), *stack, *own(after, shape[first + len(stack) :]))


def matrix_axes(names: tuple, roles: str) -> tuple:
    """The names of the axes of a matrix [*L, K, N], from those of a kernel of any rank that it stands for.

    An axis that is merged of several is split as the first of them.

    Args:
      names: of all axes of the kernel.
      roles: what they are, see `any4_jax.weights.Layout`.
    """
    of = {letter: [name for name, role in zip(names, roles, strict=True) if role == letter] for letter in "LKN"}
    return (*of["L"], of["K"][0], of["N"][0])


def own_axes(names: tuple, roles: str) -> tuple:
    """The inverse of `matrix_axes`: the names of a kernel's axes; of those that are merged, the first has the name."""
    *stack, k, n = names
    rest = {"L": iter(stack), "K": iter([k]), "N": iter([n])}
    return tuple(next(rest[role], None) for role in roles)


def kernel_axes(operator: Any) -> tuple:
    """The inverse of `array_axes`: the names of a float kernel's axes [*L, K, N], from the boxed arrays of an operator.

    An axis that no array has, or that has length 1 in all of them, gets None.
    """
    found: dict[str | int, Any] = {}
    stack = 0
    for place, box in places(operator, is_leaf=lambda node: isinstance(node, meta.AxisMetadata)):
        before, after = place.axes.split("*")
        stack = len(box.names) - len(before) - len(after)
        for axis, name in zip([*before, *range(stack), *after], box.names, strict=True):
            found[axis] = found.get(axis) or name
    return tuple(found.get(axis) for axis in (*range(stack), "K", "N"))
