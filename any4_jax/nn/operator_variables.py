"""The arrays of an operator as NNX variables, one for each, and the modules that hold them."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import reprlib

from any4_jax.nn.axes import array_axes
from any4_jax.weights import Place, is_operator, leaf_of, parts, places


class Tables(nnx.Variable):
    """A floating-point array of a quantized weight that may be trained: lut, scales, offsets, input scales."""


class Codes(nnx.Variable):
    """An integer array of a quantized weight. Optimisers and gradients ignore this class unless asked for it."""


class Quantized(nnx.Module):
    """A module around an operator: nn.nnx.Any4Linear, nn.nnx.Any4Embed.

    Attributes:
      weight: the operator [*L, N, K], rebuilt from `arrays`; may be set.
      arrays: nnx.Dict of variables, named by their places in the operator.
    """

    arrays: nnx.Dict

    @property
    def kernel_metadata(self) -> dict[str, Any]:
        """The metadata of a kernel [K, N], from which that of the arrays is made."""
        return {}

    def _arrange(self, weight: Any, place: bool) -> None:
        variables, self._structure = _variables(weight, self.kernel_metadata, place)
        self.arrays = nnx.Dict(variables)

    def __setattr__(self, name: str, value: Any) -> None:
        # NNX would record a property as an attribute, and layers with and without that record differ in structure.
        if name == "weight":
            self._arrange(value, place=False)
        else:
            super().__setattr__(name, value)

    def __nnx_repr__(self) -> Iterator[reprlib.Object]:
        # One line. NNX would print the values of the arrays.
        yield reprlib.Object(f"{type(self).__name__}({self._in_short()})", start="", end="")

    def _in_short(self) -> str:
        """The sizes, the operator and the size of a weight, in words."""
        weight = self.weight
        said = [" x ".join(map(str, weight.shape))]
        if not is_operator(weight):
            return ", ".join([*said, str(weight.dtype)])
        leaf = next(filter(None, map(leaf_of, parts(weight))), None)
        if leaf is not weight:
            said.append(type(weight).__name__)
        if leaf is not None:
            tables = "a table a row" if leaf.lut.shape[-2] > 1 else "one table"
            said += [f"{leaf.bits}-bit codes", tables, f"group_size={leaf.group_size}"]
        return ", ".join([*said, f"{weight.bits_per_weight:.4g} bits a weight"])

    @property
    def weight(self) -> Any:
        """The operator [*L, N, K]."""
        arrays = [self.arrays[name].get_value() for name in _names(self._structure)]
        return jax.tree.unflatten(self._structure, arrays)


def blank(cls: type) -> Any:
    """A module of a class, made without its __init__, which draws random numbers, and unseen by NNX, which would record
    the assignment."""
    module = _Blank()
    object.__setattr__(module, "__class__", cls)
    return module


class _Blank(nnx.Module):
    """A module with nothing in it."""


def _variables(weight: Any, metadata: Mapping[str, Any], place: bool) -> tuple[dict[str, nnx.Variable], Any]:
    """The arrays of an operator as variables by name, and the operator's structure.

    With `place`, they are put on the devices that their metadata names, if any.
    """
    variables: dict[str, nnx.Variable] = {}
    for at, leaf in places(weight):
        mine = dict(metadata)
        names = mine.pop("out_sharding", None)
        # When NNX unstacks, it removes the stack's name from the spec, and a scalar's empty spec has none to remove.
        if names and leaf.shape:
            mine["out_sharding"] = array_axes(at.axes, _padded(tuple(names), len(weight.shape)), leaf.shape)
        cls = _class_of(at, leaf.dtype)
        variable = cls(leaf, **mine) if place else cls(leaf)
        variable.set_metadata(variable.get_metadata() | mine)
        variables[_name(at)] = variable
    return variables, jax.tree.structure(weight)


def _name(at: Place) -> str:
    return at.name or "dense"


@functools.lru_cache(maxsize=1024)
def _names(structure: Any) -> tuple[str, ...]:
    """The names of the arrays of an operator with this structure, in their order."""
    return tuple(_name(at) for at, _ in places(jax.tree.unflatten(structure, range(structure.num_leaves))))


def _class_of(at: Place, dtype: Any) -> type[nnx.Variable]:
    if not jnp.issubdtype(dtype, jnp.inexact):
        return Codes
    return {None: nnx.Variable, "lora": nnx.LoRAParam}.get(at.trained, Tables)


def _padded(names: tuple, rank: int) -> tuple:
    """A name or None for each of `rank` axes. `names` may lack the stack's axes in front, and one or two at the end."""
    named = (*names, None, None)[: max(2, len(names))]
    return ((None,) * rank + named)[-rank:]


def plain_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata to give to other arrays: without hooks, which are written for float kernels, without NNX's own, and with
    the names of the axes at "out_sharding" alone, which the other keys would overrule."""
    kept = set(metadata) - nnx.Variable.required_metadata - {"sharding", "sharding_names"}
    return {key: metadata[key] for key in sorted(kept) if not key.startswith("on_")}
