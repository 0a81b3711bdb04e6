"""How operations on arrays read a stored kernel: those that turn it around, and the products."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax.nn.interpret import RULES, Reader
from any4_jax.nn.stored import Group, Stored
from any4_jax.product import matmul
from any4_jax.weights import take


def _same(eqn: Any, values: list[Any], reader: Reader) -> Sequence[Any]:
    return [values[0]]


def _cast(eqn: Any, values: list[Any], reader: Reader) -> Sequence[Any] | None:
    dtype = eqn.params["new_dtype"]
    return [dataclasses.replace(values[0], dtype=dtype)] if jnp.issubdtype(dtype, jnp.floating) else None


def _transpose(eqn: Any, values: list[Any], reader: Reader) -> Sequence[Any]:
    (kernel,) = values
    return [dataclasses.replace(kernel, groups=tuple(kernel.groups[axis] for axis in eqn.params["permutation"]))]


def _reshape(eqn: Any, values: list[Any], reader: Reader) -> Sequence[Any] | None:
    new = values[0].regrouped(eqn.outvars[0].aval.shape) if eqn.params["dimensions"] is None else None
    return None if new is None else [new]


def _squeeze(eqn: Any, values: list[Any], reader: Reader) -> Sequence[Any] | None:
    return _reshaped(values[0], eqn.outvars[0].aval.shape)


def _broadcast(eqn: Any, values: list[Any], reader: Reader) -> Sequence[Any] | None:
    (kernel, *_), shape, at = values, eqn.params["shape"], eqn.params["broadcast_dimensions"]
    # Axes of length 1 may be added; the others keep their length and order.
    if math.prod(shape) != math.prod(kernel.shape) or list(at) != sorted(at):
        return None
    return _reshaped(kernel, shape)


def _reshaped(kernel: Any, shape: Sequence[int]) -> Sequence[Any] | None:
    new = kernel.regrouped(shape)
    return None if new is None else [new]


def _slice(eqn: Any, values: list[Any], reader: Reader) -> Sequence[Any] | None:
    (kernel,) = values
    starts, limits, strides = (eqn.params[f"{name}"] for name in ("start_indices", "limit_indices", "strides"))
    cut = [axis for axis, n in enumerate(kernel.shape) if (starts[axis], limits[axis]) != (0, n)]
    if not cut and strides is None:
        return [kernel]
    if len(cut) != 1 or strides is not None or limits[cut[0]] - starts[cut[0]] != 1:
        return None
    new = kernel.index(cut[0], starts[cut[0]], keep=True)
    return None if new is None else [new]


def _dynamic_slice(eqn: Any, values: list[Any], reader: Reader) -> Sequence[Any] | None:
    kernel, *starts = values
    if not isinstance(kernel, Stored):
        return None
    sizes = eqn.params["slice_sizes"]
    cut = [axis for axis, n in enumerate(kernel.shape) if sizes[axis] != n]
    if len(cut) != 1 or sizes[cut[0]] != 1:
        return None
    # As jax does beyond the ends.
    new = kernel.index(cut[0], jnp.clip(starts[cut[0]], 0, kernel.shape[cut[0]] - 1), keep=True)
    return None if new is None else [new]


def _gather(eqn: Any, values: list[Any], reader: Reader) -> Sequence[Any] | None:
    kernel, indices = values
    if not isinstance(kernel, Stored):
        return None
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    lead = indices.ndim - 1
    whole = tuple(sizes) == (1, *kernel.shape[1:]) and indices.shape[-1] == 1
    trailing = tuple(numbers.offset_dims) == tuple(range(lead, lead + len(kernel.shape) - 1))
    if not (whole and trailing and numbers.collapsed_slice_dims == (0,) and numbers.start_index_map == (0,)):
        return None
    at, fill = indices[..., 0], eqn.params["fill_value"]
    rows = kernel.rows(at)
    if rows is not None:
        inside = ((at >= 0) & (at < kernel.shape[0]))[..., None]
        return [rows if fill is None else jnp.where(inside, rows, jnp.asarray(fill, rows.dtype))]
    if fill is not None and fill == fill:
        return None  # entries beyond the kernel are the caller's, such as zeros for a token that no expert takes
    # Under watch, a table's rows and an expert's matrix look alike: a table's rows are no factors.
    new = kernel.gathered(at, "clip" if fill is None else "fill")
    return None if new is None else [new]


def _dot(eqn: Any, values: list[Any], reader: Reader) -> Sequence[Any] | None:
    ((left, right), (left_batch, right_batch)) = eqn.params["dimension_numbers"]
    x, kernel = values
    flipped = not isinstance(kernel, Stored)
    if isinstance(x, Stored) and isinstance(kernel, Stored):
        # What was looked up in a table is an input, and so is the left one of two factors.
        table = kernel if kernel.picked and not x.picked else x
        reader.other(table, "dot_general")
        x, kernel = (each.dense() if each is table else each for each in (x, kernel))
        flipped = not isinstance(kernel, Stored)
    contracted, batch = (left, right), (left_batch, right_batch)
    if flipped:
        x, kernel, contracted, batch = kernel, x, contracted[::-1], batch[::-1]
    reader.product(kernel, x, contracted, batch)
    if not kernel.coded:
        factors = (kernel.dense(), x) if flipped else (x, kernel.dense())
        return [eqn.primitive.bind(*factors, **eqn.params)]
    y = _coded(kernel, x, contracted, batch, eqn.outvars[0].aval.dtype)
    if y is None:
        return None
    shared, free = len(batch[0]), x.ndim - len(batch[0]) - len(contracted[0])
    if flipped:
        y = jnp.moveaxis(y, range(shared, shared + free), range(y.ndim - free, y.ndim))
    return [y]


def rows_of(kernel: Stored, x: jax.Array, contracted: Any, batch: Any) -> tuple[jax.Array, Group] | None:
    """The other factor of a product as the matrix reads it: (x [*batch, *free, K], the axes of L in `batch` in the
    order of the stack); None if the product contracts other axes than K, or numbers other matrices than those of L."""
    inner = tuple(axis for at in contracted[1] for axis in kernel.groups[at])
    outer = tuple(axis for at in batch[1] for axis in kernel.groups[at])
    if sorted(inner) != sorted(kernel.inputs) or not set(outer) <= set(kernel.stack) or not inner:
        return None
    free = [axis for axis in range(x.ndim) if axis not in (*contracted[0], *batch[0])]
    moved = jnp.transpose(x, (*batch[0], *free, *contracted[0]))
    own = [x.shape[axis] for axis in free]
    moved = moved.reshape(*kernel.lengths(outer), *own, *kernel.lengths(inner))
    shared = [axis for axis in kernel.stack if axis in outer]
    at = len(outer) + len(own)
    order = (*map(outer.index, shared), *range(len(outer), at), *(at + inner.index(axis) for axis in kernel.inputs))
    rows = jnp.transpose(moved, order)
    return rows.reshape(*rows.shape[:at], -1), tuple(shared)


def _coded(kernel: Stored, x: jax.Array, contracted: Any, batch: Any, dtype: Any) -> jax.Array | None:
    """The product [*batch, *free of x, *free of the kernel] with a coded kernel, or None."""
    found = rows_of(kernel, x, contracted, batch)
    if found is None or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    rows, shared = found
    free = rows.shape[len(shared) : -1]
    flat = rows.reshape(*rows.shape[: len(shared)], -1, rows.shape[-1])
    y = kernel.times(flat, shared, jnp.promote_types(x.dtype, dtype)).astype(dtype)
    y = y.reshape(*kernel.lengths(kernel.stack), *free, *kernel.lengths(kernel.outputs))
    # Each axis of y by name: those of the kernel by number, those of x by -1 - place.
    names = (*kernel.stack, *(-1 - i for i in range(len(free))), *kernel.outputs)
    outer = [axis for at in batch[1] for axis in kernel.groups[at]]
    kept = [group for at, group in enumerate(kernel.groups) if at not in (*contracted[1], *batch[1])]
    order = (*outer, *(-1 - i for i in range(len(free))), *(axis for group in kept for axis in group))
    y = jnp.transpose(y, tuple(map(names.index, order)))
    batches = [math.prod(kernel.lengths(kernel.groups[at])) for at in batch[1]]
    return y.reshape(*batches, *free, *(math.prod(kernel.lengths(group)) for group in kept))


def _ragged(eqn: Any, values: list[Any], reader: Reader) -> Sequence[Any] | None:
    x, kernel, sizes = values[:3]
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    ((mine, theirs), (shared, _)) = numbers.dot_dimension_numbers
    plain_form = tuple(numbers.lhs_ragged_dimensions) == (0,) and tuple(numbers.rhs_group_dimensions) == (0,)
    if not isinstance(kernel, Stored) or isinstance(x, Stored) or not plain_form or shared or x.ndim != 2:
        return None
    # Rows beyond the groups are zero; they count for no expert.
    ends = jnp.cumsum(sizes)
    experts = jnp.searchsorted(ends, jnp.arange(x.shape[0]), side="right").astype(jnp.int32)
    reader.chosen(kernel, x, experts)
    one = kernel.groups[0]
    if not kernel.coded:
        return [eqn.primitive.bind(x, kernel.dense(), *values[2:], **eqn.params)]
    # A product of one row has its outputs in the kernel's order.
    rest = [group for at, group in enumerate(kernel.groups) if at not in (0, *theirs)]
    reads = kernel.stack == one and kernel.groups[theirs[0]] == kernel.inputs and rest == [kernel.outputs]
    reads = reads and tuple(mine) == (1,)
    if not reads or x.shape[0] > sizes.shape[0]:
        return None
    dtype = eqn.outvars[0].aval.dtype
    wide = x.astype(jnp.promote_types(x.dtype, dtype))

    def row(both: Any) -> jax.Array:
        expert, own = both
        y = matmul(own[None], take(kernel.weight, jnp.minimum(expert, sizes.shape[0] - 1)))[0]
        return jnp.where(expert < sizes.shape[0], y, 0)

    return [jax.lax.map(row, (experts, wide)).astype(dtype)]


RULES.update(
    {
        "convert_element_type": _cast,
        "copy": _same,
        "copy_p": _same,
        "name": _same,
        "sharding_constraint": _same,
        "transpose": _transpose,
        "reshape": _reshape,
        "squeeze": _squeeze,
        "broadcast_in_dim": _broadcast,
        "slice": _slice,
        "dynamic_slice": _dynamic_slice,
        "gather": _gather,
        "dot_general": _dot,
        "ragged_dot_general": _ragged,
    }
)
