"""Names of axes, for sharding: from those of a float kernel to those of each array of the operator in its place."""

from typing import Any

from jax.tree_util import GetAttrKey

_AXES = {
    "codes": "NK",
    "lut": "N",
    "scales": "NK",
    "offsets": "NK",
    "a": ".K",
    "b": "N",
    "scale": "K",
    "permutation": "K",
    "levels": ".",
}
"""What the axes of an operator's field run along, after the stack's; a dot, and what isn't said, is neither N nor K."""


def field_of(path: tuple[Any, ...]) -> str:
    """The field that holds the array at a path in an operator, "" for an operator that is an array."""
    return next((key.name for key in reversed(path) if isinstance(key, GetAttrKey)), "")


def array_axes(field: str, kernel: tuple, shape: tuple[int, ...]) -> tuple:
    """The names of an array's axes.

    An axis of length 1 (one table for all rows, one group) can't be split and gets None.

    Args:
      field: see `field_of`; an array in a field of another name is a plain matrix [*L, N, K].
      kernel: the names of all axes of the float kernel [*L, K, N].
      shape: of the array. It may have fewer axes than its field has letters: the scale of a LowRank is one number.
    """
    *stack, k, n = kernel
    along = {"N": n, "K": k, ".": None}
    own = shape[len(stack) :]
    axes = _AXES.get(field, "NK").ljust(len(own), ".")
    return (*stack, *(None if size == 1 else along[axis] for size, axis in zip(own, axes, strict=False)))
