"""What a model holds, checked before it is quantized: no NaN, no infinity."""

from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from any4_jax.methods.checks import all_finite
from any4_jax.surgery import container_of, trees
from any4_jax.surgery.linen_modules import is_pair, params_of

_FEW = 3

_all_finite = jax.jit(all_finite)


def is_finite(tree: Any) -> bool:
    """Whether no floating-point array of a tree holds NaN or infinity."""
    return all(map(bool, [_finite(array) for array in jax.tree.leaves(tree) if _is_float(array)]))


def _finite(array: Any) -> Any:
    """Whether a floating-point array holds neither NaN nor infinity; a bool that a device may still be computing."""
    if isinstance(array, jax.Array) and (array.devices() - set(jax.devices("cpu")) or not array.is_fully_addressable):
        return _all_finite(array)
    # Numpy looks at it where it lies, and nothing is compiled for its shape.
    return np.isfinite(np.asarray(array)).all()


def _is_float(array: Any) -> bool:
    return hasattr(array, "__array__") and jnp.issubdtype(array.dtype, jnp.floating)


def refuse_nonfinite(model: Any, apart: Iterable[jax.Array] = ()) -> None:
    """Refuses a model that computes with parameters that are NaN or infinite.

    Args:
      model: any that `quantize_model` takes; parameters that are only shapes are passed over.
      apart: arrays of the model that are not looked at.

    Raises:
      ValueError: an array holds NaN or infinite values; the message names the first few.
    """
    skipped = {id(array) for array in apart}
    # One bool for each array, all of them on their way before the first is waited for.
    finite = {
        path: _finite(array)
        for path, leaf in _parameters(model).items()
        for array in jax.tree.leaves(leaf)
        if _is_float(array) and id(array) not in skipped
    }
    bad = [path for path, whole in finite.items() if not whole]
    if bad:
        raise ValueError(f"{few(bad)}: got NaN or infinite values, need finite ones; fix the checkpoint")


def _parameters(model: Any) -> dict[str, Any]:
    """What a model has learned, by dotted path. Its other variables, such as masks, may be infinite."""
    if isinstance(model, nnx.Module):
        variables = nnx.to_flat_state(nnx.state(model, nnx.Param))
        return {trees.dotted(path): variable.get_value() for path, variable in variables}
    return trees.leaves(params_of(model[1]) if is_pair(model) else container_of(model).tree(model))


def few(paths: Collection[str]) -> str:
    """The first of some paths, and how many more there are."""
    shown = ", ".join(list(paths)[:_FEW])
    return shown if len(paths) <= _FEW else f"{shown} and {len(paths) - _FEW} more"
