"""Quantized kernels in NNX modules that know nothing of them.

`Any4Kernel` sits where the module had an nnx.Param. The module keeps its class's code: `holding` makes a subclass of
the same name whose methods are traced with a float array in the kernel's place, and run by `interpret`, so that
products read the codes.
"""

import functools
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from any4_jax.nn.axes import matrix_axes
from any4_jax.nn.interpret import evaluate, plain, trace
from any4_jax.nn.operator_variables import Quantized, blank, plain_metadata
from any4_jax.nn.stored import Stored, stored
from any4_jax.nn.watching import Gathering, empty
from any4_jax.statistics import Gathered
from any4_jax.weights import Contraction, Layout, contraction

_NONE: Mapping[str, Any] = {}


class Kernel(nnx.Module):
    """A kernel in the place of an nnx.Param, which the methods of its module read in products.

    Read in any other way (`kernel[...]`, `kernel.value`, or as an array in jnp), it is the float array, as it was.
    """

    _layout: Layout

    def stored(self, path: str) -> Stored:
        """What a program finds in the kernel's place."""
        raise NotImplementedError

    @property
    def layout(self) -> Layout:
        """How the axes of the float kernel become those of a matrix."""
        return self._layout

    def get_value(self, **_: Any) -> jax.Array:
        """The float kernel, as nnx.Variable.get_value. A program that reads it so decodes it in each call."""
        whole = self.stored("")
        if whole.coded and any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(whole.weight)):
            warnings.warn(
                f"a kernel {list(self.shape)}: its codes are decoded as a whole in each call, because code outside of "
                "its module reads it; let a method of that module multiply by it, or leave it float by a rule",
                stacklevel=3,
            )
        return whole.dense()

    value = property(get_value)

    def __getitem__(self, at: Any) -> jax.Array:
        return self.get_value()[at]

    def __jax_array__(self) -> jax.Array:
        return self.get_value()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the float kernel."""
        return self.layout.dims

    @property
    def ndim(self) -> int:
        """The number of axes of the float kernel."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the float kernel."""
        return jnp.dtype(self._layout.dtype)

    @property
    def T(self) -> jax.Array:
        """The float kernel, transposed."""
        return self.get_value().T

    def astype(self, dtype: Any) -> jax.Array:
        """The float kernel in another dtype."""
        return self.get_value().astype(dtype)


class Any4Kernel(Quantized, Kernel):
    """A quantized kernel of any rank, see `Kernel`.

    Attributes:
      weight: the operator [*L, N, K]; may be set.
      arrays: nnx.Dict of variables, as in Any4Linear.
      layout: how the axes of the float kernel became those of the matrix.
    """

    @classmethod
    def of(cls, weight: Any, layout: Layout, metadata: Mapping[str, Any] = _NONE) -> "Any4Kernel":
        """A kernel around an existing operator [*L, N, K], with the metadata of the float kernel's variable."""
        kernel: Any = blank(cls)
        kernel._layout = layout
        kernel._metadata = tuple(_of_matrix(plain_metadata(metadata), layout).items())
        kernel._arrange(weight, False)
        return kernel

    _metadata: tuple[tuple[str, Any], ...]

    @property
    def kernel_metadata(self) -> dict[str, Any]:
        """The metadata of the kernel as a matrix [*L, K, N], from which that of the arrays is made."""
        return dict(self._metadata)

    @property
    def layout(self) -> Layout:
        """How the axes of the float kernel became those of the matrix."""
        return self.contraction.layout

    @property
    def own_layout(self) -> Layout:
        """The layout that the kernel was made with."""
        return self._layout

    @property
    def contraction(self) -> Contraction:
        """The weight and its layout as one operator."""
        return contraction(self.weight, self._layout)

    def stored(self, path: str) -> Stored:
        """What a program finds in the kernel's place."""
        return stored(path, self.weight, self.layout)


def _of_matrix(metadata: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """A variable's metadata, with the names of the matrix's axes in place of the kernel's.

    What else numbers or names axes, such as the "param_scan_axis" of a trainer, is left out: it is of the kernel's.
    """
    names = metadata.pop("out_sharding", None)
    metadata = {key: value for key, value in metadata.items() if not key.endswith(("_axis", "_axes"))}
    if names and len(names) == len(layout.roles):
        metadata["out_sharding"] = matrix_axes(tuple(names), layout.roles)
    return metadata


class WatchedKernel(Kernel):
    """A float kernel that keeps statistics of what its products read, in a variable of its own.

    Attributes:
      kernel: the float kernel.
      seen: the statistics so far.
    """

    def __init__(self, kernel: nnx.Variable, layout: Layout, needs: tuple[Any, ...]) -> None:
        self.kernel, self._layout = kernel, layout
        # The type of the kernel's own variable: what slices that one, by its type, slices this one too.
        self.seen = type(kernel)(empty(layout.shape[-1], needs, layout.shape[:-2]))

    @property
    def layout(self) -> Layout:
        """How the axes of the float kernel become those of a matrix."""
        array, own = self.kernel.get_value(), self._layout.shape[:-2]
        more = array.ndim - len(self._layout.dims)
        return self._layout.stacked((*array.shape[:more], *own) if more >= 0 else own[-more:])

    def stored(self, path: str) -> Stored:
        """What a program finds in the kernel's place."""
        return stored(path, self.kernel.get_value(), self.layout)

    def gathered(self) -> Gathered:
        """The statistics so far; their stack has the axes of L that are left within nnx.scan and nnx.vmap."""
        held = self.seen.get_value()
        return Gathered(dict(held), held.k, self.layout.shape[:-2])

    def keep(self, gathered: Gathered) -> None:
        """Keeps new statistics."""
        held = self.seen.get_value()
        self.seen.set_value(Gathered(dict(gathered), held.k, held.stack))


def put_kernel(holder: nnx.Module, name: str, kernel: Kernel, reader: nnx.Module) -> None:
    """Puts a kernel in the place of a parameter.

    Args:
      holder: the module whose attribute `name` is the parameter.
      name: of the attribute.
      kernel: takes the place.
      reader: the module whose methods read it: `holder`, or the nearest module around it if that is a container. Its
        class becomes one that reads kernels.
    """
    if not isinstance(reader, CONTAINERS):
        object.__setattr__(reader, "__class__", holding(type(reader)))
    setattr(holder, name, kernel)


CONTAINERS = (nnx.List, nnx.Dict)
"""The modules without code of their own: what they hold is read by the methods of the module around them."""


def state_key(module: nnx.Module, attribute: str) -> str | int:
    """The key that an attribute of a module has in the module's state: a number in an nnx.List."""
    return int(attribute) if isinstance(module, nnx.List) and attribute.isdigit() else attribute


@functools.cache
def holding(cls: type) -> type:
    """The subclass of a module's class whose methods read kernels; it has the name of the class."""
    if hasattr(cls, "_float_class"):
        return cls
    described: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    described["_float_class"] = cls
    for base in cls.__mro__[: cls.__mro__.index(nnx.Module)]:
        for name, member in vars(base).items():
            if _is_method(member) and (name == "__call__" or not name.startswith("__")):
                described.setdefault(name, _reading(getattr(cls, name)) if callable(getattr(cls, name)) else member)
    is_pytree = getattr(cls, "_pytree__is_pytree", True)
    return types.new_class(cls.__name__, (cls,), {"pytree": is_pytree}, lambda space: space.update(described))


def _is_method(member: Any) -> bool:
    """Whether a member of a class is a method, such as a function or what nnx.jit makes of one."""
    return callable(member) and hasattr(member, "__get__") and not isinstance(member, type | staticmethod | classmethod)


def _reading(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _through(self, method, args, kwargs)

    return call


def kernels_of(module: nnx.Module) -> dict[tuple, Kernel]:
    """The kernels that the methods of a module read: its own and those in its containers, by place in its state."""
    return dict(_kernels_below(module, ()))


def _kernels_below(module: nnx.Module, path: tuple) -> Iterator[tuple[tuple, Kernel]]:
    for name, value in vars(module).items():
        at = (*path, state_key(module, name))
        if isinstance(value, Kernel):
            yield at, value
        elif isinstance(value, CONTAINERS):
            yield from _kernels_below(value, at)


def _through(module: Any, method: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """The result of a method of the float class, whose products read the module's kernels as they are stored."""
    found = kernels_of(module)
    places = {".".join(map(str, at)): at for at in found}
    held = dict(zip(places, found.values(), strict=True))
    lengths = set(map(len, found))
    graphdef, state = nnx.split(module)
    flat = nnx.to_flat_state(state)
    mine = {place: variable for place, variable in flat if not any(place[:n] in found for n in lengths)}
    before = {place: variable.get_value() for place, variable in mine.items()}

    def run(kernels: dict[str, jax.Array], values: dict[Any, Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        new = [(place, variable.replace(values[place]) if place in values else variable) for place, variable in flat]
        twin = nnx.merge(graphdef, nnx.from_flat_state(new))
        object.__setattr__(twin, "__class__", module._float_class)
        for name, kernel in kernels.items():
            *outer, last = places[name]
            holder = functools.reduce(lambda node, key: getattr(node, str(key)), outer, twin)
            setattr(holder, str(last), nnx.Param(kernel))
        attributes, structure = dict(vars(twin)), nnx.graphdef(twin)
        result = method(twin, *args, **kwargs)
        if nnx.graphdef(twin) != structure:
            ours = {name: value for name, value in vars(twin).items() if not name.startswith("_")}
            changed = sorted(name for name, value in ours.items() if value is not attributes.get(name))
            raise ValueError(
                f"got a call of {type(twin).__name__} that sets its {' and '.join(changed) or 'attributes'}, which is "
                "lost, since a module that holds coded kernels is traced; keep such state in an nnx.Variable that the "
                "module has from the start, or leave its kernels float by a rule"
            )
        after = dict(nnx.to_flat_state(nnx.state(twin)))
        return result, {place: after[place].get_value() for place in values if place in after}

    inputs = {name: kernel.stored(name) for name, kernel in held.items()}
    floats = {name: jax.ShapeDtypeStruct(each.shape, each.dtype) for name, each in inputs.items()}
    program, arrays, result = trace(run, floats, before, args, kwargs)
    watched = {name: kernel for name, kernel in held.items() if isinstance(kernel, WatchedKernel)}
    reader = Gathering({name: kernel.gathered() for name, kernel in watched.items()})
    names = sorted(held)  # as jax flattens a dict
    outputs = evaluate(program, [*(inputs[name] for name in names), *arrays[len(names) :]], reader)
    for name, kernel in watched.items():
        kernel.keep(reader.state[name])
    answer, after = result(list(map(plain, outputs)))
    for place, value in after.items():
        if value is not before[place]:
            mine[place].set_value(value)
    return answer
