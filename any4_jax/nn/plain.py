"""Which NNX layers compute what a quantized layer would compute in their place."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen import dtypes as linen_dtypes
from flax.nnx.nn import dtypes

_CLASSES = (nnx.Linear, nnx.Embed)
_WRAPPERS = (nnx.WeightNorm, nnx.SpectralNorm)
_OWN = ("kernel", "bias", "embedding")
_HELD = (nnx.Variable, nnx.Module)
_PROMOTIONS = (dtypes.promote_dtype, linen_dtypes.promote_dtype)


def is_layer(module: Any) -> bool:
    """Whether a module is an nnx.Linear or nnx.Embed, or derives from one. An nnx.LoRALinear is none: its own code
    reads its kernel, as an einsum's does, and adds its adapter."""
    return isinstance(module, _CLASSES) and getattr(module, "_float_class", type(module)) is not nnx.LoRALinear


def why_not_plain(layer: Any) -> str | None:
    """Why no Any4Linear or Any4Embed can take the place of an nnx.Linear or nnx.Embed, in words; None if one can.

    A subclass may compute something else, and so may functions of the caller's that the layer calls. `precision` is no
    reason: products of quantized weights run at HIGHEST.
    """
    base = next((cls for cls in _CLASSES if isinstance(layer, cls)), None)
    if type(layer) is not base:
        of = "no nnx.Linear or nnx.Embed" if base is None else f"a subclass of nnx.{base.__name__}"
        return f"a {type(layer).__name__}, {of}"
    beside = [name for name, value in vars(layer).items() if name not in _OWN and isinstance(value, _HELD)]
    if beside:
        return f"an nnx.{base.__name__} with {' and '.join(beside)} beside its kernel"
    turned = _turned(layer)
    if turned is not None:
        return turned
    changed = []
    if layer.promote_dtype not in _PROMOTIONS:
        changed.append("promote_dtype")
    if isinstance(layer, nnx.Linear):
        if layer.dot_general is not jax.lax.dot_general:
            changed.append("dot_general")
        if not _is_dtype_of(layer.preferred_element_type, layer.dtype):
            changed.append("preferred_element_type")
    return f"an nnx.{base.__name__} with its own {' and '.join(changed)}" if changed else None


def _turned(layer: Any) -> str | None:
    """Why the matrix of a layer is not in its last two axes, in words; None if it is."""
    if isinstance(layer, nnx.Embed):
        return None
    shape = tuple(layer.kernel.get_value().shape)
    need = (layer.in_features, layer.out_features)
    if shape[-2:] == need:
        return None
    return f"an nnx.Linear {list(need)} with a kernel {list(shape)}, whose stack is not in front"


def _is_dtype_of(preferred: Any, dtype: Any) -> bool:
    """Whether a product has the dtype of the layer's output anyway."""
    return preferred is None or (dtype is not None and jnp.dtype(preferred) == jnp.dtype(dtype))


def rewritten(model: nnx.Module) -> dict[tuple, str]:
    """The layers whose float arrays a wrapper of flax rewrites in each call, by path, and why they stay, in words."""
    found = {}
    for path, node in nnx.iter_modules(model):
        if isinstance(node, _WRAPPERS):
            for inner, layer in nnx.iter_modules(node.layer_instance):
                if isinstance(layer, _CLASSES):
                    found[*path, "layer_instance", *inner] = f"within an nnx.{type(node).__name__}, which rewrites it"
    return found
