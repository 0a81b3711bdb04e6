"""A quantized block as a function of what is trained of it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax import scaling
from any4_jax.methods.tune_leaf import Start, at_rest, started
from any4_jax.weights import is_operator


class Student:
    """A quantized block as a function of what is trained of it."""

    def __init__(
        self, contents: dict[str, Any], dtypes: dict[str, str], floats: dict[str, jax.Array], *, norms: bool
    ) -> None:
        """`dtypes` are those of the float kernels of what is trained, by name; `floats` what their codes stand for."""
        self.contents, self.dtypes = contents, dtypes
        self.starts = {name: started(contents[name], floats.get(name)) for name in dtypes}
        self.vectors = _vectors(contents) if norms else []

    def at_rest(self) -> dict[str, Any]:
        """Zeros for all that is trained, by name."""

        def zeros(node: Any) -> dict[str, Any]:
            return at_rest(node.leaf, rounding=node.place is not None) if _is_start(node) else {}

        found = {name: jax.tree.map(zeros, start, is_leaf=_is_start) for name, start in self.starts.items()}
        return found | {name: {"floats": jnp.zeros(self.contents[name].shape, jnp.float32)} for name in self.vectors}

    def dense(self, moves: Mapping[str, Any]) -> dict[str, Any]:
        """The contents with dense matrices in the place of codes, and as float kernels where nothing else is there."""
        made = self.contents | self._vectors(moves)
        for name, dtype in self.dtypes.items():
            matrix = self._each(lambda start, own: start.matrix(own), name, moves)
            made[name] = matrix if is_operator(matrix) else jnp.swapaxes(matrix, -1, -2).astype(dtype)
        return made

    def stored(self, moves: Mapping[str, Any]) -> dict[str, Any]:
        """What is trained, as it is stored."""
        return self._vectors(moves) | {
            name: self._each(lambda start, own: start.moved(own), name, moves) for name in self.dtypes
        }

    def _each(self, function: Callable[[Start, Any], Any], name: str, moves: Mapping[str, Any]) -> Any:
        def applied(node: Any, own: Any) -> Any:
            return function(node, own) if _is_start(node) else node

        return jax.tree.map(applied, self.starts[name], moves[name], is_leaf=_is_start)

    def _vectors(self, moves: Mapping[str, Any]) -> dict[str, jax.Array]:
        made = {}
        for name in self.vectors:
            old = self.contents[name].astype(jnp.float32)
            value = old + jnp.sqrt(jnp.square(old).mean()) * moves[name]["floats"]
            dtype = self.contents[name].dtype
            made[name] = scaling.straight_through(
                scaling.rounded(jax.lax.stop_gradient(value), dtype), value.astype(dtype)
            )
        return made


def _is_start(node: Any) -> bool:
    return isinstance(node, Start)


def _vectors(contents: Mapping[str, Any]) -> list[str]:
    """The names of floating arrays of one axis: the scales of norms, and biases."""
    plain = {name: leaf for name, leaf in contents.items() if not is_operator(leaf)}
    return [name for name, leaf in plain.items() if leaf.ndim == 1 and jnp.issubdtype(leaf.dtype, jnp.floating)]
