"""Calls of NNX modules that are traced to find their kernels."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from any4_jax.weights import Layout


def under_maps(says: Layout | str, seen: set[tuple[int, ...]]) -> Layout | str:
    """A layout in which the axes are of L that nnx.vmap or nnx.scan took before the model's code read the kernel.

    Args:
      says: what tracing told. Where the other factor of a product has no such axis, it told N of it.
      seen: the shapes in which the code read the kernel.
    """
    if isinstance(says, str) or not seen:
        return says
    least = min(map(len, seen))
    more = len(says.dims) - least
    if more <= 0:
        return says
    if any(len(shape) == least and shape != says.dims[more:] for shape in seen):
        return f"an array {list(says.dims)} that nnx.vmap or nnx.scan maps over another axis than the first"
    return Layout("L" * more + says.roles[more:], says.dims, says.dtype)


class _Seen:
    """A hook of a variable that keeps the shapes in which it is read.

    All of them are equal: variables whose metadata differ could not be stacked, nor take each other's place in a jit.
    """

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        self.shapes = shapes

    def __call__(self, variable: Any, value: Any) -> Any:
        self.shapes.add(tuple(value.shape))
        return value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Seen)

    def __hash__(self) -> int:
        return hash(_Seen)


def caller(
    model: nnx.Module, kernels_at: Mapping[tuple, str], mapped: dict[str, set[tuple[int, ...]]]
) -> Callable[..., Any]:
    """A function of (kernels by name, arguments, arguments by name) that calls the model, or its method "method".

    Args:
      model: stays as it is.
      kernels_at: the names of the kernels, by their paths in the model, whose last is an attribute.
      mapped: the shapes in which the model's code reads each kernel are added to it, by name.
    """
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    # The state of an nnx.List numbers its attributes.
    names = {at: kernels_at[own] for at, _ in flat if (own := (*at[:-1], str(at[-1]))) in kernels_at}

    def watched(name: str, variable: Any, kernel: Any) -> Any:
        new = variable.replace(kernel)
        hooks = new.get_metadata().get("on_get_value", ())
        own = hooks if isinstance(hooks, tuple) else (hooks,)
        new.set_metadata(on_get_value=(*own, _Seen(mapped.setdefault(name, set()))))
        return new

    def run(kernels: dict[str, Any], arguments: tuple, named: dict[str, Any]) -> Any:
        new = [
            (at, watched(names[at], v, kernels[names[at]]) if at in names else v.replace(v.get_value()))
            for at, v in flat
        ]
        twin = nnx.merge(graphdef, nnx.from_flat_state(new))
        named = dict(named)
        method = named.pop("method", "__call__")
        call = getattr(twin, method, None) if isinstance(method, str) else None
        if call is None:
            raise TypeError(
                f"got inputs for {method!r} of a {type(twin).__name__}, which has no method of this name; pass a dict "
                "of arguments by name, with 'method' among them"
            )
        return call(*arguments, **named)

    return run
