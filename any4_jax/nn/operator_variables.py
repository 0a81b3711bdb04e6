"""The arrays of an operator as NNX variables, one each, and the modules that hold them."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import GetAttrKey, tree_flatten_with_path

from any4_jax.nn.axes import array_axes
from any4_jax.weights import LowRank, QuantizedTensor


class Tables(nnx.Variable):
    """A floating-point array of a quantized weight (lut, scales, offsets, input scales): what may be trained."""


class Codes(nnx.Variable):
    """An integer array of a quantized weight. No optimiser and no gradient looks at this class."""


class Quantized(nnx.Module):
    """A module around an operator: nn.nnx.Any4Linear, nn.nnx.Any4Embed.

    Attributes:
      weight: the operator [*L, N, K], rebuilt from `arrays`; may be set.
      arrays: nnx.Dict of variables, named by their places in the operator.
    """

    arrays: nnx.Dict

    @property
    def kernel_metadata(self) -> dict[str, Any]:
        """The metadata that the arrays' are made from, as of a kernel [K, N]."""
        return {}

    def _arrange(self, weight: Any, place: bool) -> None:
        variables, self._structure = _variables(weight, self.kernel_metadata, place)
        self.arrays = nnx.Dict(variables)

    def __setattr__(self, name: str, value: Any) -> None:
        # NNX would note a property among the module's attributes, and layers with and without the note differ.
        if name == "weight":
            self._arrange(value, place=False)
        else:
            super().__setattr__(name, value)

    @property
    def weight(self) -> Any:
        """The operator [*L, N, K]."""
        places = _places(jax.tree.unflatten(self._structure, range(self._structure.num_leaves)))
        return jax.tree.unflatten(self._structure, [self.arrays[name].get_value() for name, *_ in places])


def blank(cls: type) -> Any:
    """A module of a class, past its __init__, which draws random numbers, and past NNX's record of assignments."""
    module = _Blank()
    object.__setattr__(module, "__class__", cls)
    return module


class _Blank(nnx.Module):
    """A module with nothing in it."""


def _variables(weight: Any, metadata: Mapping[str, Any], place: bool) -> tuple[dict[str, nnx.Variable], Any]:
    """The arrays of an operator as variables by name, and the operator's structure.

    `place` puts them on devices as their metadata says, if it does.
    """
    variables: dict[str, nnx.Variable] = {}
    for name, owner, field, leaf in _places(weight):
        mine = dict(metadata)
        names = mine.pop("out_sharding", None)
        # NNX takes the stack's name from a spec when it unstacks, and the empty one of a scalar has none.
        if names and leaf.shape:
            mine["out_sharding"] = array_axes(field, _padded(tuple(names), len(weight.shape)), leaf.shape)
        kind = _kind(owner, field, leaf.dtype)
        variable = kind(leaf, **mine) if place else kind(leaf)
        variable.set_metadata(variable.get_metadata() | mine)
        variables[name] = variable
    return variables, jax.tree.structure(weight)


def _places(node: Any, name: str = "", owner: Any = None, field: str = "dense") -> Iterator[tuple[str, Any, str, Any]]:
    """(name, the operator it is in, the field there, leaf) of an operator's leaves, in their order. An array that is
    in no operator is called dense."""
    for path, child in tree_flatten_with_path(node, is_leaf=lambda inner: inner is not node)[0]:
        if not path:
            yield name or field, owner, field, node
        elif isinstance(path[0], GetAttrKey):
            yield from _places(child, f"{name}/{path[0].name}".lstrip("/"), node, path[0].name)
        else:
            yield from _places(child, f"{name}/{getattr(path[0], 'idx', path[0])}".lstrip("/"), owner, field)


def _kind(owner: Any, field: str, dtype: Any) -> type[nnx.Variable]:
    if not jnp.issubdtype(dtype, jnp.inexact):
        return Codes
    if isinstance(owner, LowRank):
        return nnx.Variable if field == "scale" else nnx.LoRAParam
    # Products with integers may take a uniform table for the ramp that it is, so it must stay one.
    return nnx.Variable if isinstance(owner, QuantizedTensor) and owner.uniform and field == "lut" else Tables


def _padded(names: tuple, rank: int) -> tuple:
    """A name, or None, for each of `rank` axes: names may leave out a stack's axes in front, and one or two behind."""
    named = (*names, None, None)[: max(2, len(names))]
    return ((None,) * rank + named)[-rank:]
