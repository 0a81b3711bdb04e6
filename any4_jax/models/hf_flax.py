"""Hugging Face's Flax models with quantized weights: the classes of transformers 4 whose names start with Flax."""

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

from any4_jax.nn.swapping import intercepted, layers_of, quantized_dense
from any4_jax.weights import is_operator


def is_hf_flax(model: Any) -> bool:
    """Whether a model is a Flax model of transformers. Imports nothing: if there is one, its module is imported."""
    module = sys.modules.get("transformers.modeling_flax_utils")
    return module is not None and isinstance(model, module.FlaxPreTrainedModel)


def flax_transformers() -> ModuleType:
    """The package `transformers`, in a version that has Flax models.

    Raises:
        ImportError: it is absent, or has no Flax models.
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
    """A Hugging Face model with other parameters; any of the kernels may be quantized.

    The new model has a subclass of the same name, so isinstance holds; the model that is passed in stays as it was.
    Calling it, jit and `generate` work as before. Two methods differ: `init_cache` creates the cache alone, whereas
    transformers initialises all float weights in every `generate` to learn its shape; and `save_pretrained` refuses
    quantized weights.

    Args:
        hf: a Flax model of transformers.
        params: its nested dict, with an operator [N, K] of `any4_jax.weights` in place of any dense kernel [K, N].
        interceptors: for `flax.linen.intercept_methods`; every call of the module runs under these, in addition to
            those that it has and the one that multiplies by operators.

    Raises:
        ValueError: a parameter is missing (transformers' own check).
    """
    new = copy.copy(hf)
    cls: type = type(hf)
    new.__class__ = _quantizable(cls)
    new._module = intercepted(hf._module, *interceptors, quantized_dense)
    # A model made with _do_init=False would refuse to hold parameters.
    new._is_initialized = True
    new.params = params
    return new


def abstract_model(name: str, config: Mapping[str, Any], dtype: DTypeLike, *interceptors: Callable[..., Any]) -> Any:
    """A Flax model of transformers without weights, to be filled by `with_params`.

    Args:
        name: of the class, such as "FlaxOPTForCausalLM".
        config: what `config.to_dict()` of such a model returns.
        dtype: of activations.
        interceptors: see `with_params`.

    Returns:
        The model, with a jax.ShapeDtypeStruct for each parameter (float32, as transformers initialises them).

    Raises:
        ImportError: see `flax_transformers`.
        ValueError: transformers has no Flax model with this name.
    """
    transformers = flax_transformers()
    found: Any = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.modeling_flax_utils.FlaxPreTrainedModel):
        raise ValueError(
            f"transformers {transformers.__version__} has no Flax model {name!r}; install a version that has it"
        )
    cls: Any = found
    # The scalar type, because transformers recognizes float32 by identity with jnp.float32.
    scalar_type = getattr(jnp, jnp.dtype(dtype).name)
    with contextlib.ExitStack() as stack:
        for interceptor in reversed(interceptors):  # as `intercepted` does
            stack.enter_context(nn.intercept_methods(interceptor))
        hf = cls(cls.config_class.from_dict(dict(config)), dtype=scalar_type, _do_init=False)
    return with_params(hf, hf.params_shape_tree, *interceptors)


def dense_paths(hf: Any) -> dict[str, bool]:
    """The dense layers of a model, by dotted path without ".kernel"; a head tied to the embedding isn't one.

    The value is True if the kernel in `hf.params` is [K, N], as in flax.linen.Dense, and False if it is [N, K], as in
    GPT-2's layers. The layers are found by tracing the model's initialisation, which creates no weights.
    """
    return layers_by_name(hf)[0]


def layers_by_name(hf: Any) -> tuple[dict[str, bool], dict[str, str]]:
    """`dense_paths`, and by the same names the layers that can't take an operator, with the reasons in words."""
    layers = layers_of(lambda: hf.init_weights(hf.key, hf.input_shape))
    plain = {".".join(path): turned for path, turned in layers.plain.items()}
    return plain, {".".join(path): reason for path, reason in layers.special.items()}


class _Quantizable:
    """What differs from the class of transformers that follows it among the bases."""

    params: Any

    def init_cache(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own cache: zeros, created from the shapes alone."""
        make = super().init_cache  # type: ignore[misc]
        shapes = jax.eval_shape(lambda: make(*args, **kwargs))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def save_pretrained(self, save_directory: Any, params: Any = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' own `save_pretrained`, for float weights.

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
