"""Converts models to nested dicts of arrays with a JSON spec, for the user's own Orbax checkpoints, and back."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from any4_jax.checkpoint.contents import build, contents, current, describe


def to_arrays(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A quantized model as a nested dict of plain arrays, for your own Orbax checkpoint, and a spec that rebuilds it.

    The dict has the names of the model's own tree: the parameters of Linen and Hugging Face models (or the collections,
    if these were passed), the variables of an NNX module by attribute, the items of a list by number. An operator is a
    dict of its fields, at the key of the matrix that it replaces: "kernel", or "embedding" in an embedding.

        layer/kernel/codes    uint8 [*L, N, ceil(K * bits / 8)], see any4_jax.packing; for 3, 5 and 6 bits a dict of
                              planes "0" and "1"
        layer/kernel/lut      [*L, N or 1, 2**bits]
        layer/kernel/scales   [*L, N, ceil(K/G)]; quantized scales are a dict like this one
        layer/kernel/offsets  like scales; absent for symmetric formats
        layer/bias            [*L, N], unchanged, like every other array

    An operator that contains operators nests the same way: "inner", "terms/0", and so on.

    Args:
      model: whatever `quantize_model` takes.

    Returns:
      (arrays, spec): the dict, which shares the model's arrays, and plain JSON for `from_arrays`.

    Raises:
      TypeError: the model is a Decoder whose class belongs to no family.
      ValueError: as `any4_jax.save`.
    """
    arrays: dict[str, Any] = {}
    spec = describe(model, arrays)
    return unflatten_dict({_keys(name): array for name, array in arrays.items()}), spec


def from_arrays(arrays: Mapping[str, Any], spec: Mapping[str, Any], *, into: Any = None) -> Any:
    """The inverse of `to_arrays`.

    Args:
      arrays: the nested dict, of jax or numpy arrays.
      spec: the spec that `to_arrays` of this version or an earlier one returned with it; a round trip through JSON
        does no harm.
      into: see `any4_jax.load`.

    Returns:
      The nested dict of arrays and operators; with `into`, a model of its kind.

    Raises:
      ValueError: an array of the spec is missing, the spec doesn't name an array, or the contents don't fit `into`.
    """
    flat = {keys: _array(array) for keys, array in flatten_dict(dict(arrays)).items()}
    named: set[tuple[str, ...]] = set()

    def take(name: str) -> Any:
        named.add(_keys(name))
        if _keys(name) not in flat:
            raise ValueError(f"the arrays lack {name!r} of the spec; pass the two that to_arrays returned together")
        return flat[_keys(name)]

    spec = current(spec)
    tree = contents(spec, take)
    unknown = [".".join(keys) for keys in flat if keys not in named]
    if unknown:
        raise ValueError(f"the spec has no array {unknown[0]!r}; pass the two that to_arrays returned together")
    return tree if into is None else build(spec, take, into)


def _keys(name: str) -> tuple[str, ...]:
    return tuple(name.replace("/", ".").split("."))


def _array(array: Any) -> Any:
    # Operators compute with jax arrays, and some ways to restore return numpy arrays.
    return jnp.asarray(array) if isinstance(array, np.ndarray) else array
