"""What an operator is: a weight matrix [N, K], stored in any arrays, and the functions over it.

`operator` registers a type once. From then on it is multiplied, looked up, saved, loaded, sharded and trained like the
types of this package. `dequantize`, `product` and `take_rows` are `functools.singledispatch` functions, with which a
new type registers its own implementations. They take a plain array [N, K] too.

    @operator(axes={"diagonal": "K"}, trains={"diagonal": "tables"})
    class Diagonal(Operator):
        diagonal: jax.Array

        @property
        def shape(self):
            return (*self.diagonal.shape, self.diagonal.shape[-1])
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, tree_flatten_with_path

from any4_jax.pytree import register_dataclass

Trained = Literal["tables", "lora", "floats"] | None
"""What an array is trained as: a table, scale or offset; a low-rank factor; anything else; None for a constant."""


class Operator:
    """The base class of operators; `operator` registers a subclass."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(*L, N, K), where L are leading axes: layers stacked for a scan, experts."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays."""
        return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """8 * bytes of the stored arrays / number of weights."""
        return 8 * self.nbytes / math.prod(self.shape)

    def __repr__(self) -> str:
        """One line: the shapes and dtypes of arrays, the values of static fields, and no value of any array."""
        made: Any = self  # `operator` makes a dataclass of each class
        fields = dataclasses.fields(made)
        return f"{type(self).__name__}({', '.join(f'{f.name}={_in_short(getattr(self, f.name))}' for f in fields)})"


def _in_short(value: Any) -> str:
    if isinstance(value, tuple | list):
        inner = ", ".join(map(_in_short, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    return repr(value)


@dataclasses.dataclass(frozen=True)
class _Registration:
    axes: Mapping[str, str]
    trains: Mapping[str, Trained | Callable[[Any], Trained]]


_REGISTERED: dict[type, _Registration] = {}
_BY_NAME: dict[str, type] = {}
_NONE: Mapping[str, Any] = {}


@typing.dataclass_transform(frozen_default=True)
def operator(
    *,
    static: Collection[str] = (),
    axes: Mapping[str, str] = _NONE,
    trains: Mapping[str, Trained | Callable[[Any], Trained]] = _NONE,
) -> Callable[[type], Any]:
    """Decorator that makes a subclass of `Operator` a frozen dataclass and a pytree, and registers it.

    Fields hold arrays, operators, tuples of these, or None. Checkpoints know the operator by the name of its class.

    Args:
      static: the fields that hold plain values (bool, int, float, str or tuples of them) and are part of the tree's
        structure.
      axes: by field, a letter for each axis of its array after the leading axes L: "N", "K", or "." for neither. For a
        field that holds an operator, what that operator's N and K run along. "NK" is the default. "*" says where the
        axes L are if they are not in front.
      trains: by field, what its floating-point array may be trained as, or a function from the operator to that.
        "floats" is the default. Operators in a field have their own registration, and integers are never trained.

    Raises:
      TypeError: the class is not a subclass of Operator, or has no `shape`.
      ValueError: another class has its name, it lacks a field that is named here, or it has a field "operator".
    """

    def register(cls: type) -> Any:
        if not issubclass(cls, Operator) or cls.shape is Operator.shape:
            raise TypeError(f"got the class {cls.__name__}, need a subclass of Operator with a shape; define one")
        taken = _BY_NAME.get(cls.__name__)
        # A notebook's cell that defines an operator may run again.
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"got an operator {cls.__name__}, but in checkpoints that name means "
                f"{taken.__module__}.{taken.__qualname__}; choose another name"
            )
        made: Any = dataclasses.dataclass(frozen=True, repr=False)(cls)
        names = [field.name for field in dataclasses.fields(made)]
        unknown = [name for name in (*static, *axes, *trains) if name not in names]
        if unknown:
            raise ValueError(f"got the field {unknown[0]!r}, {cls.__name__} has {', '.join(names)}; name one of these")
        if "operator" in names:
            raise ValueError(
                f"got {cls.__name__} with a field 'operator', under which checkpoints keep the class's name; rename it"
            )
        register_dataclass(cls, [name for name in names if name not in static], list(static))
        _REGISTERED[cls] = _Registration(dict(axes), dict(trains))
        _BY_NAME[cls.__name__] = cls
        return cls

    return register


def is_operator(node: Any) -> bool:
    """Whether a node of a tree is a registered operator. Arrays are not."""
    return type(node) in _REGISTERED


def operator_types() -> Mapping[str, type]:
    """The registered types by their names in checkpoints."""
    return dict(_BY_NAME)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an array is in an operator, and what the registrations on the way to it say about it.

    Attributes:
      name: field names, and indices into tuples, from the outside in: "terms/0/scales". "" for a plain array.
      axes: what the array's axes run along, as in `operator`, in terms of the outermost N and K; "*" stands for L.
      trained: what the array may be trained as, if its dtype is floating.
    """

    name: str
    axes: str
    trained: Trained


def places(w: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[Place, Any]]:
    """The arrays of an operator with their places, in the order of `jax.tree.leaves`.

    Args:
      w: an operator, or an array.
      is_leaf: as in `jax.tree.leaves`: says which nodes are returned as if they were arrays.
    """
    return list(_places(w, Place("", "*NK", "floats"), None, is_leaf))


def _places(node: Any, at: Place, owner: Any, is_leaf: Callable[[Any], bool] | None) -> Iterator[tuple[Place, Any]]:
    if is_leaf is not None and is_leaf(node):
        yield at, node
        return
    within = _REGISTERED.get(type(node))
    for path, child in tree_flatten_with_path(node, is_leaf=lambda inner: inner is not node)[0]:
        if not path:
            yield at, node
            return
        key = path[0]
        if within is not None and isinstance(key, GetAttrKey):
            trained = within.trains.get(key.name, "floats")
            inner = Place(
                f"{at.name}/{key.name}".lstrip("/"),
                _composed(at.axes, within.axes.get(key.name, "NK")),
                trained(node) if callable(trained) else trained,
            )
        else:
            inner = dataclasses.replace(at, name=f"{at.name}/{getattr(key, 'idx', key)}".lstrip("/"))
        yield from _places(child, inner, node, is_leaf)


def _composed(outer: str, axes: str) -> str:
    """What `axes` of a field come to in an operator whose own axes are `outer`; the last two are those of N and K."""
    along = {"*": outer[:-2], "N": outer[-2], "K": outer[-1], ".": "."}
    return "".join(along[axis] for axis in (axes if "*" in axes else f"*{axes}"))


def parts(w: Any) -> list[Any]:
    """An operator and all operators within it, from the outside in; an empty list for an array."""
    if not is_operator(w):
        return []
    inner = jax.tree.leaves(w, is_leaf=lambda node: node is not w and is_operator(node))
    return [w, *(part for node in inner for part in parts(node))]


@functools.singledispatch
def dequantize(w, dtype=jnp.float32) -> jax.Array:
    """The dense matrix [*L, N, K] that an operator stands for, computed in float32 and rounded once to `dtype`.

    Raises:
      TypeError: `w` is not an operator.
    """
    # Tracers are jax.Arrays to isinstance but not to singledispatch, so arrays have no registration of their own.
    if isinstance(w, jax.Array):
        return w.astype(dtype)
    raise _unknown(w, "dequantize")


@functools.singledispatch
def product(w, x: jax.Array, backend: str | None = None) -> jax.Array:
    """x W^T [M, N] in x's dtype, accumulated in float32; `any4_jax.matmul` calls it once x has two axes.

    An operator over others registers an implementation in terms of their products. The implementation for an operator
    that kernels read as a whole asks `any4_jax.product.plan` for a kernel.

    Args:
      w: an operator or array [N, K].
      x: [M, K], a floating dtype.
      backend: the name of the kernel to use wherever there is a choice; None leaves the choice to the plan.

    Raises:
      TypeError: `w` is not an operator.
    """
    if isinstance(w, jax.Array):
        return dense_product(x, w.astype(x.dtype))
    raise _unknown(w, "product")


@functools.singledispatch
def take_rows(w, rows: jax.Array) -> Any:
    """Some rows of an operator or array, without decoding them.

    Args:
      w: an operator or array [N, K].
      rows: int [R], from 0 to N - 1; others are clipped.

    Returns:
      An operator or array [R, K].

    Raises:
      TypeError: `w` is not an operator.
    """
    if isinstance(w, jax.Array):
        return jnp.take(w, rows, axis=0, mode="clip")
    raise _unknown(w, "take_rows")


def _unknown(w: Any, function: str) -> TypeError:
    if isinstance(w, np.ndarray):
        return TypeError(
            "got a numpy array, need an array of jax or an operator of any4_jax.weights; pass jnp.asarray(w)"
        )
    return TypeError(
        f"got a {type(w).__name__}, need an array or an operator of any4_jax.weights; register {function} for it"
    )


def dense_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x W^T [M, N] in x's dtype, for x [M, K] and an array W [N, K], accumulated in float32.

    Precision.HIGHEST keeps a GPU or TPU from rounding float32 operands to fewer bits.
    """
    y = jax.lax.dot_general(
        x,
        w,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return y.astype(x.dtype)
