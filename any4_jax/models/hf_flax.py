"""Hugging Face's Flax models with quantized weights: what transformers 4 offers under names starting with Flax."""

import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from any4_jax.nn.swapping import dense_layers, intercepted, quantized_dense
from any4_jax.weights import is_operator


def is_hf_flax(model: Any) -> bool:
    """Whether a model is one of transformers' Flax models. Imports nothing: whoever holds one has imported them."""
    module = sys.modules.get("transformers.modeling_flax_utils")
    return module is not None and isinstance(model, module.FlaxPreTrainedModel)


def flax_transformers() -> ModuleType:
    """The package `transformers`, in a version that has Flax models.

    Raises:
        ImportError: it is absent, or of a version that has none.
    """
    try:
        import transformers
        import transformers.modeling_flax_utils
    except ImportError as error:
        raise ImportError(
            f"Hugging Face's Flax models need transformers 4, which can't be imported here ({error}); "
            'pip install "any4_jax[hf-flax]", or use any4_jax.models.load, whose Llama needs no transformers'
        ) from error
    return transformers


def with_params(hf: Any, params: Mapping[str, Any], *interceptors: Callable[..., Any]) -> Any:
    """A Hugging Face model over other parameters, any of whose kernels may be quantized.

    It is of the same class (a subclass of the same name, so isinstance holds), and the model passed in stays as it
    was. Calling it, jit of it and `generate` work as before. Two things differ: `init_cache` makes the cache and
    nothing else, where transformers initialises all weights in float to learn its shape, in every `generate`; and
    `save_pretrained` refuses quantized weights.

    Args:
        hf: a Flax model of transformers.
        params: its nested dict, with an operator [N, K] of `any4_jax.weights` in place of any dense kernel [K, N].
        interceptors: for `flax.linen.intercept_methods`, put around every run of the module besides those that it
            has and the one that multiplies by operators.

    Raises:
        ValueError: a parameter is missing (transformers' own check).
    """
    new = copy.copy(hf)
    cls: type = type(hf)
    new.__class__ = _quantizable(cls)
    new._module = intercepted(hf._module, *interceptors, quantized_dense)
    # Made with _do_init=False, a model would refuse to hold any parameters.
    new._is_initialized = True
    new.params = params
    return new


def abstract_model(name: str, config: Mapping[str, Any], dtype: DTypeLike, *interceptors: Callable[..., Any]) -> Any:
    """A model of a class of transformers without weights, to be filled by `with_params`.

    Args:
        name: of the class, such as "FlaxOPTForCausalLM".
        config: as the `config.to_dict()` of such a model gives it.
        dtype: of activations.
        interceptors: see `with_params`.

    Returns:
        The model, with a jax.ShapeDtypeStruct for each parameter (float32, as transformers initialises).

    Raises:
        ImportError: see `flax_transformers`.
        ValueError: transformers has no Flax model of this name.
    """
    transformers = flax_transformers()
    found: Any = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.modeling_flax_utils.FlaxPreTrainedModel):
        raise ValueError(
            f"transformers {transformers.__version__} has no Flax model {name!r}; install a version with it"
        )
    cls: Any = found
    # The scalar type, since transformers tells float32 by identity with jnp.float32.
    scalar_type = getattr(jnp, jnp.dtype(dtype).name)
    with contextlib.ExitStack() as stack:
        for interceptor in reversed(interceptors):  # as `intercepted` does
            stack.enter_context(nn.intercept_methods(interceptor))
        hf = cls(cls.config_class.from_dict(dict(config)), dtype=scalar_type, _do_init=False)
    return with_params(hf, hf.params_shape_tree, *interceptors)


def dense_paths(hf: Any) -> dict[str, bool]:
    """The dense layers of a model by dotted path without ".kernel"; a head tied to the embedding is none.

    True where the kernel in `hf.params` is [K, N], as flax.linen.Dense keeps it; False where it is [N, K], as GPT-2's
    layers do. Found by tracing the model's initialisation: no weights are made.
    """
    layers = dense_layers(lambda: hf.init_weights(hf.key, hf.input_shape))
    return {".".join(path): turned for path, turned in layers.items()}


class _Quantizable:
    """What differs from the class of transformers that stands after it among the bases."""

    params: Any

    def init_cache(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own cache, of zeros, from its shapes alone."""
        make = super().init_cache  # type: ignore[misc]
        shapes = jax.eval_shape(lambda: make(*args, **kwargs))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def save_pretrained(self, save_directory: Any, params: Any = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, for float weights.

        Raises:
            ValueError: the weights are quantized.
        """
        leaves = jax.tree.leaves(self.params if params is None else params, is_leaf=is_operator)
        if any(is_operator(leaf) for leaf in leaves):
            raise ValueError("save_pretrained can't write quantized weights; save this model with any4_jax.save")
        return super().save_pretrained(save_directory, params, *args, **kwargs)  # type: ignore[misc]


@functools.cache
def _quantizable(cls: type) -> type:
    if issubclass(cls, _Quantizable):
        return cls
    described = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (_Quantizable, cls), described)
