"""Models as nested dicts of arrays and a JSON spec, for Orbax checkpoints of the user's own, and back."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from any4_jax.checkpoint.contents import build, contents, current, describe


def to_arrays(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A quantized model as a nested dict of arrays alone, for an Orbax checkpoint of your own, and what rebuilds it.

    The dict has the names of the model's own tree: parameters of Linen and Hugging Face models (or the collections,
    where these were passed), variables of an NNX module by attribute, items of lists by number. An operator is a
    dict at the key of the matrix whose place it takes, "kernel" or, of embeddings, "embedding", by its fields:

        layer/kernel/codes    uint8 [*L, N, ceil(K * bits / 8)], see any4_jax.packing; for 3, 5 and 6 bits a dict of
                              planes "0" and "1"
        layer/kernel/lut      [*L, N or 1, 2**bits]
        layer/kernel/scales   [*L, N, ceil(K/G)]; quantized scales are a dict like this one
        layer/kernel/offsets  like scales; absent for symmetric formats
        layer/bias            [*L, N], as every other array: what it was

    Operators over operators nest the same way: "inner", "terms/0", and so on.

    Args:
      model: whatever `quantize_model` takes.

    Returns:
      (arrays, spec): the dict, which shares the model's arrays, and plain JSON for `from_arrays`.

    Raises:
      TypeError: a Decoder of a class that no family has.
      ValueError: keys that are no strings, or hold "." or "/".
    """
    arrays: dict[str, Any] = {}
    spec = describe(model, arrays)
    return unflatten_dict({_keys(name): array for name, array in arrays.items()}), spec


def from_arrays(arrays: Mapping[str, Any], spec: Mapping[str, Any], *, into: Any = None) -> Any:
    """The inverse of `to_arrays`.

    Args:
      arrays: the nested dict, of jax or numpy arrays.
      spec: what `to_arrays` returned with it, as it was or after a round trip through JSON; also that of earlier
        versions.
      into: see `any4_jax.load`.

    Returns:
      The nested dict of arrays and operators, or with `into` a model like it.

    Raises:
      ValueError: the arrays lack one of the spec or have one that it doesn't name; the contents don't fit `into`.
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
    # Operators compute with jax arrays; other restorers give numpy's.
    return jnp.asarray(array) if isinstance(array, np.ndarray) else array
