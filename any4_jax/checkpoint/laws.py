"""Whether an operator that a file describes holds together: its fields have their types, and its arrays fit each other.

What an operator's registration and its `dequantize` say is checked for every operator, also of other packages. An
operator whose arrays could contradict each other without notice, because a product would read past a table or repeat a
vector, has an entry of `fault` besides.
"""

import dataclasses
import functools
import operator
import types
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import tree_flatten_with_path

from any4_jax import packing, scaling
from any4_jax.checkpoint.manifest import shown
from any4_jax.schema import check
from any4_jax.weights import (
    Operator,
    PermuteInput,
    QuantizedTensor,
    QuantizeInput,
    ScaleInput,
    Sparse,
    Sum,
    dequantize,
    is_operator,
    parts,
    places,
)

_ADVICE = "quantize again, and save it"
_LARGEST = 2**31 - 1


def check_operator(name: str, w: Any) -> None:
    """Raises ValueError unless an operator, and every operator in it, holds together.

    Args:
      name: where it is, for the message.
      w: an operator over arrays or ShapeDtypeStructs.
    """
    for part in reversed(parts(w)):
        kind = type(part).__name__
        _check_types(name, part)
        wrong = _own_fault(part) or _shape_fault(part) or _matrix_fault(part)
        if wrong:
            raise ValueError(f"{name}: the arrays of its {kind} don't belong together: {wrong}; {_ADVICE}")


@functools.singledispatch
def fault(w: Any) -> str | None:
    """What is wrong with an operator whose fields have their types; None if nothing is. A phrase that names the field.

    Register a function for an operator that needs one; whatever it raises is a fault too.
    """
    return None


@fault.register
def _(w: QuantizedTensor) -> str | None:
    widths = packing.PLANES.get(w.bits)
    if widths is None:
        return f"bits is {w.bits}, and one of {', '.join(map(str, packing.PLANES))} is needed"
    if not 1 <= w.group_size <= _LARGEST:
        return f"group_size is {w.group_size}, and 1 to {_LARGEST} is needed"
    if not 0 <= w.padding < max(2, 8 // widths[0]):
        return f"padding is {w.padding}, and 0 to {8 // widths[0] - 1} is needed"
    if len(w.planes) != len(widths) or not all(_is_array(p) and len(p.shape) >= 2 for p in w.planes):
        return f"codes are {_described(w.codes)}, and {len(widths)} arrays of at least two axes are needed"
    *stack, n, k = w.shape
    sizes = [(*stack, n, packing.plane_bytes(k, width)) for width in widths]
    lut = w.lut.shape
    fits = len(lut) >= 2 and lut in ((*stack, 1, 2**w.bits), (*stack, n, 2**w.bits))
    if k < 0 or any(p.shape != size or p.dtype != jnp.uint8 for p, size in zip(w.planes, sizes, strict=True)):
        return f"codes are {_described(w.codes)}, and uint8 {', '.join(str(list(s)) for s in sizes)} is needed"
    if not fits or not (_is_floating(w.lut) or w.lut.dtype == jnp.int8):
        return f"lut is {_described(w.lut)}, and floats or int8 {[*stack, f'1 or {n}', 2**w.bits]} are needed"
    groups = (*stack, n, scaling.group_count(k, w.group_size))
    for field, stored in (("scales", w.scales), ("offsets", w.offsets)):
        if stored is None and field == "offsets":
            continue
        exponents = _is_array(stored) and stored.dtype == jnp.uint8 and field == "scales"
        if not (is_operator(stored) or _is_floating(stored) or exponents) or stored.shape != groups:
            return f"{field} are {_described(stored)}, and floats {list(groups)} are needed"
    return None


@fault.register
def _(w: QuantizeInput) -> str | None:
    if not 2 <= w.bits <= 8:
        return f"bits is {w.bits}, and 2 to 8 is needed"
    levels = (*w.shape[:-2], 2**w.bits)
    if w.levels is not None and not (_is_floating(w.levels) and w.levels.shape == levels):
        return f"levels are {_described(w.levels)}, and floats {list(levels)} are needed"
    if w.scale is not None and not (w.symmetric and w.per == "tensor"):
        return f"scale is that of a whole input without a zero point, and symmetric={w.symmetric}, per={w.per!r}"
    return None


@fault.register
def _(w: Sum) -> str | None:
    shapes = [tuple(getattr(term, "shape", ())) for term in w.terms]
    if not shapes or any(shape != shapes[0] for shape in shapes):
        return f"its terms have the shapes {shown([*map(list, shapes)])}, and one shape for all is needed"
    return None


@fault.register
def _(w: Sparse) -> str | None:
    n, blocks = w.ends.shape[-1], w.values.shape[-2]
    if not 0 <= w.k <= _LARGEST:
        return f"k is {w.k}, and 0 to {_LARGEST} is needed"
    if blocks < 1 or n % blocks:
        return f"values are {_described(w.values)}, and a number of blocks that divides N={n} is needed"
    if w.columns.shape != w.values.shape:
        return f"columns are {_described(w.columns)}, and {list(w.values.shape)} is needed"
    if not all(jnp.issubdtype(index.dtype, jnp.integer) for index in (w.ends, w.columns)):
        return f"ends are {_described(w.ends)} and columns {_described(w.columns)}, and integers are needed"
    return None


@fault.register
def _(w: ScaleInput) -> str | None:
    return _per_input("scale", w.scale, w.shape)


@fault.register
def _(w: PermuteInput) -> str | None:
    return _per_input("permutation", w.permutation, w.shape)


def _per_input(field: str, array: Any, shape: tuple[int, ...]) -> str | None:
    need = (*shape[:-2], shape[-1])
    return None if array.shape == need else f"{field} is {_described(array)}, and {list(need)} is needed"


def _check_types(name: str, w: Any) -> None:
    """Raises ValueError unless the fields of an operator have the types of its class's annotations."""
    try:
        hints = typing.get_type_hints(type(w))
    except NameError:
        hints = {}  # annotations of another package that only a type checker resolves
    # The registration says which fields hold arrays: those are the children of the node.
    children = {path[0].name for path, _ in tree_flatten_with_path(w, is_leaf=lambda node: node is not w)[0]}
    for field in dataclasses.fields(w):
        hint, value = hints.get(field.name, Any), getattr(w, field.name)
        where = f"{name}: {field.name} of its {type(w).__name__}"
        if field.name not in children:
            check(hint, value, where, _ADVICE)
            continue
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if not any(_holds(option, value) for option in options):
            need = getattr(hint, "__name__", hint)
            raise ValueError(f"{where} is {_described(value)}, and {need} is needed; {_ADVICE}")


def _holds(hint: Any, value: Any) -> bool:
    """Whether a field that has this annotation, or one of a union that has it, can hold this value."""
    if hint is type(None):
        return value is None
    if hint is jax.Array:
        return _is_array(value)
    if typing.get_origin(hint) is tuple and not isinstance(value, tuple):
        return False
    if isinstance(hint, type) and issubclass(hint, Operator):
        return isinstance(value, hint)
    return all(_is_array(node) or is_operator(node) for node in jax.tree.leaves(value, is_leaf=is_operator))


def _own_fault(w: Any) -> str | None:
    try:
        return fault(w)
    except Exception as error:
        return f"they give no shape ({_first_line(error)})"


def _shape_fault(w: Any) -> str | None:
    """What the axes that an operator is registered with say against its arrays and operators."""
    try:
        shape = tuple(map(operator.index, w.shape))
    except Exception as error:
        return f"they give no shape ({_first_line(error)})"
    if len(shape) < 2 or min(shape) < 0:
        return f"they give the shape {list(shape)}"
    stack = shape[:-2]
    for place, held in places(w, is_leaf=lambda node: node is not w and is_operator(node)):
        at, own = place.axes.index("*"), tuple(held.shape)
        if len(own) != len(place.axes) - 1 + len(stack) or own[at : at + len(stack)] != stack:
            need = [*["."] * at, *stack, *["."] * (len(place.axes) - at - 1)]
            return f"{place.name} is {_described(held)}, and [{', '.join(map(str, need))}] is needed"
    return None


def _matrix_fault(w: Any) -> str | None:
    """What `dequantize` says against an operator, traced for one matrix of its stack."""
    shape = tuple(w.shape)
    arrays = []
    for place, array in places(w):
        at = place.axes.index("*")
        arrays.append((*array.shape[:at], *array.shape[at + len(shape) - 2 :]))
    dtypes = [jnp.dtype(array.dtype).name for array in jax.tree.leaves(w)]
    return _traced_fault(jax.tree.structure(w), tuple(zip(arrays, dtypes, strict=True)), shape[-2:])


@functools.lru_cache
def _traced_fault(structure: Any, arrays: tuple[tuple[Any, str], ...], shape: tuple[int, ...]) -> str | None:
    w = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(own, dtype) for own, dtype in arrays])
    try:
        found = tuple(jax.eval_shape(dequantize, w).shape)
    except Exception as error:
        return f"they give no matrix ({_first_line(error)})"
    return None if found == shape else f"they give a matrix {list(found)}, and {list(shape)} is needed"


def _is_array(node: Any) -> bool:
    return hasattr(node, "shape") and hasattr(node, "dtype") and not is_operator(node)


def _is_floating(node: Any) -> bool:
    return _is_array(node) and jnp.issubdtype(node.dtype, jnp.floating)


def _described(value: Any) -> str:
    """An array's dtype and shape, or what else is in a field."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_described, value))})"[:120]
    if is_operator(value):
        return f"a {type(value).__name__} {list(value.shape)}"
    return f"{value.dtype} {list(value.shape)}" if _is_array(value) else shown(value)


def _first_line(error: Exception) -> str:
    return shown((str(error).splitlines() or [type(error).__name__])[0])
