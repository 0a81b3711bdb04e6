"""The containers that models come in, and how each finds and replaces linears and converts to a plain tree."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from any4_jax.methods.matrices import Matrix
from any4_jax.models.hf_flax import is_hf_flax
from any4_jax.surgery import linen_modules, nnx_modules, trees
from any4_jax.surgery.declarations import Declared
from any4_jax.surgery.rules import Recipe


@dataclasses.dataclass(frozen=True)
class Container:
    """What a model is made of. Linears are named by dotted path; operators are those of any4_jax.weights.

    Attributes:
      name: what messages call it.
      owns: model -> whether it is made of this.
      matrices: (model, inputs, declared) -> the float matrices of its linears; see `quantize_model` for inputs, and
        `rules.declarations` for what is declared.
      operators: model -> the operators of its quantized linears.
      replace: (model, operators by path, recipe or None) -> a new model.
      tree: model -> its contents: a nested dict of arrays and operators by name, an operator at the key "kernel" of
        its linear; ShapeDtypeStructs if the model is abstract. It leaves out the state of an NNX module's random
        numbers. The contents of a tree of arrays are the tree itself.
      fill: (model, contents, recipe or None) -> a new model with these contents and this record of how they were
        quantized. The model may be abstract, float or quantized. Raises ValueError if the contents don't fit, as
        `fitting.check` says.
    """

    name: str
    owns: Callable[[Any], bool]
    matrices: Callable[[Any, Any, Declared], dict[str, Matrix]]
    operators: Callable[[Any], dict[str, Any]]
    replace: Callable[[Any, Mapping[str, Any], Any], Any]
    tree: Callable[[Any], Any]
    fill: Callable[[Any, Any, Any], Any]


def _tree_matrices(model: Any, inputs: Any, declared: Declared) -> dict[str, Matrix]:
    if inputs is not None:
        raise ValueError(
            "got example inputs for a tree of arrays, which has no code that reads them; declare kernels by "
            "rules such as (r'.*\\.w', method, any4_jax.Axes('KN')), and pass statistics as stats"
        )
    return trees.matrices(model, declared)


CONTAINERS: tuple[Container, ...] = (
    Container(
        "an NNX module",
        lambda model: isinstance(model, nnx.Module),
        nnx_modules.matrices,
        nnx_modules.operators,
        nnx_modules.replace,
        nnx_modules.contents,
        nnx_modules.fill,
    ),
    Container(
        "a Hugging Face Flax model",
        is_hf_flax,
        linen_modules.hf_matrices,
        linen_modules.hf_operators,
        linen_modules.hf_replace,
        linen_modules.hf_contents,
        linen_modules.hf_fill,
    ),
    Container(
        "a Linen module with its variables",
        linen_modules.is_pair,
        linen_modules.pair_matrices,
        linen_modules.pair_operators,
        linen_modules.pair_replace,
        linen_modules.pair_contents,
        linen_modules.pair_fill,
    ),
    Container(
        "a tree of arrays",
        lambda model: True,
        _tree_matrices,
        trees.operators,
        trees.replace,
        trees.contents,
        trees.fill,
    ),
)


def container_of(model: Any) -> Container:
    """What a model is made of: the first of CONTAINERS that owns it."""
    return next(container for container in CONTAINERS if container.owns(model))


def recipe_of(model: Any) -> Recipe | None:
    """How a model was quantized; None if it doesn't say."""
    recipe = getattr(model[0] if isinstance(model, tuple) else model, "recipe", None)
    return recipe if isinstance(recipe, Recipe) else None
