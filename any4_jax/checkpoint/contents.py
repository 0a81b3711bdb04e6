"""Describes a model in a manifest, and rebuilds the model from its description.

The content of a manifest (schema 2) is a JSON object with these keys, whatever the model is:

    family   for a decoder, its name in any4_jax.models.families; otherwise "hf_flax", "nnx", "linen" or "tree"
    config   for a decoder, its config; for a Hugging Face model, its config.json; otherwise null
    dtype    the dtype of the activations of these two; otherwise null
    tree     arrays and operators by name: nested {"dict": {...}}, {"list": [...]} and {"leaf": ...}; a leaf is an
             operator with its fields, or {"array": its name}
    recipe   how the model was quantized, or null
    model    its "class", and for a Hugging Face model also "generation" and "repaired"; for a tree null

`any4_jax.checkpoint.schema1` converts contents of schema 1 to this form.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from any4_jax.checkpoint import schema1
from any4_jax.checkpoint.operators import recipe_from_spec, recipe_spec
from any4_jax.checkpoint.trees import build_tree, describe_tree
from any4_jax.models import families, hf_flax, hf_identity
from any4_jax.models.base import Decoder
from any4_jax.surgery import Recipe, container_of, fitting, linen_modules, nnx_modules, recipe_of

Take = Callable[[str], Any]


def describe(model: Any, arrays: dict[str, Any]) -> dict[str, Any]:
    """The content that describes a model. Adds the model's arrays to `arrays`, named as `any4_jax.save` says.

    Raises:
      TypeError: the model is a Decoder whose class belongs to no family.
      ValueError: a key isn't a string, or holds "." or "/".
    """
    recipe = recipe_of(model)
    return _identity(model) | {
        "tree": describe_tree(container_of(model).tree(model), "", arrays),
        "recipe": None if recipe is None else recipe_spec(recipe),
    }


def build(content: Mapping[str, Any], take: Take, into: Any = None) -> Any:
    """The inverse of `describe`.

    Args:
      content: a content of schema 2.
      take: maps a name to its array, or to a ShapeDtypeStruct that stands for it.
      into: see `any4_jax.load`.

    Raises:
      ValueError: the content is malformed, contradicts itself, or doesn't fit `into`.
    """
    tree, recipe = contents(content, take), recipe_in(content)
    if is_decoder(content):
        return _decoder(content, tree, recipe, into)
    if content["family"] == "hf_flax":
        with _parsing():
            into = hf_identity.model_for(content, into)
    return tree if into is None else container_of(into).fill(into, tree, recipe)


def current(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The content of a manifest in the form of schema 2, whichever schema it was written in."""
    with _parsing():
        return schema1.upgraded(content)


def contents(content: Mapping[str, Any], take: Take) -> Any:
    """Only the tree of arrays and operators."""
    with _parsing():
        return build_tree(content["tree"], take)


def recipe_in(content: Mapping[str, Any]) -> Recipe | None:
    """How the model was quantized, or None."""
    with _parsing():
        return None if content["recipe"] is None else recipe_from_spec(content["recipe"])


def is_decoder(content: Mapping[str, Any]) -> bool:
    """Whether the model is a decoder of this library."""
    with _parsing():
        return content["family"] not in families.WITHOUT_FAMILY


def _identity(model: Any) -> dict[str, Any]:
    """Everything in a content except the tree and the recipe."""
    if isinstance(model, Decoder):
        family = families.family_of(model)
        config, dtype = family.config_to_json(model.config), str(model.dtype)
        return {"family": family.name, "config": config, "dtype": dtype, "model": {"class": type(model).__name__}}
    if hf_flax.is_hf_flax(model):
        return {"family": "hf_flax", **hf_identity.identity(model)}
    known: dict[str, Any] = {"config": None, "dtype": None}
    if isinstance(model, nnx.Module):
        return known | {"family": "nnx", "model": {"class": type(model).__name__}}
    if linen_modules.is_pair(model):
        module = getattr(model[0], "inner", model[0])
        return known | {"family": "linen", "model": {"class": type(module).__name__}}
    return known | {"family": "tree", "model": None}


def _decoder(content: Mapping[str, Any], tree: Any, recipe: Recipe | None, into: Any) -> nnx.Module:
    """The decoder of a config with the contents of `tree`, created without float weights."""
    family = families.named(content["family"])
    with _parsing():
        config, dtype = family.config_from_json(content["config"]), jnp.dtype(content["dtype"])
    if into is not None:
        _check_decoder(into, family, config, dtype)
    abstract = family.abstract(config, dtype)
    try:
        # The weights may differ in dtype from the activations, and the config doesn't say how.
        return nnx_modules.fill(abstract, tree, recipe, declared=False)
    except fitting.Misfit as misfit:
        raise ValueError(
            f"its contents don't fit a {family.module.__name__} of its own config ({misfit.faults}), so it "
            "contradicts itself; save it again"
        ) from None


def _check_decoder(into: Any, family: families.Family, config: Any, dtype: Any) -> None:
    """Raises ValueError unless `into` is a decoder with this family, config and dtype."""
    name = family.module.__name__
    if type(into) is not family.module:
        raise ValueError(
            f"it holds a {name} of this library, and `into` is {container_of(into).name} ({type(into).__name__}); "
            f"omit `into`, or pass a {name}"
        )
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(into.config, field.name)
        if ours != theirs:
            raise ValueError(f"its {name} has {field.name}={ours!r}, and `into` has {theirs!r}; omit `into`")
    if into.dtype != dtype:
        raise ValueError(f"its {name} has dtype {dtype}, and `into` has {into.dtype}; omit `into`")


@contextlib.contextmanager
def _parsing() -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError) as error:
        raise ValueError(f"any4.json lacks or misnames {error}; save it again") from error
