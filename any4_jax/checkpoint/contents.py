"""Describes a model in a manifest, and rebuilds the model from its description.

The content of a manifest (schema 2) is a JSON object with these keys, whatever the model is:

    family   for a decoder, its name in any4_jax.models.families; otherwise "hf_flax", "nnx", "linen" or "tree"
    config   for a decoder, its config; for a Hugging Face model, its config.json; otherwise null
    dtype    the dtype of the activations of these two; otherwise null
    tree     arrays and operators by name: nested {"dict": {...}}, {"list": [...]} and {"leaf": ...}; a leaf is an
             operator with its fields, or {"array": its name}
    recipe   how the model was quantized, or null
    model    its "class", and for a Hugging Face model also "generation" and "repaired"; for a tree null
    cache    for a decoder, the cache that it carries (any4_jax.kv_cache.catalogue); null or absent for none

`any4_jax.checkpoint.schema1` converts contents of schema 1 to this form.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from any4_jax.checkpoint import schema1
from any4_jax.checkpoint.content_schema import Content2, check_content
from any4_jax.checkpoint.depth import check_nesting
from any4_jax.checkpoint.laws import check_operator
from any4_jax.checkpoint.manifest import Manifest, shown
from any4_jax.checkpoint.operators import recipe_from_spec, recipe_spec
from any4_jax.checkpoint.trees import build_tree, describe_tree
from any4_jax.kv_cache import DefaultCache, default_cache
from any4_jax.kv_cache.catalogue import cache_from_json, cache_to_json, check_creates
from any4_jax.models import families, hf_flax, hf_identity
from any4_jax.models.base import Decoder
from any4_jax.surgery import Recipe, container_of, fitting, linen_modules, nnx_modules, recipe_of, trees
from any4_jax.weights import is_operator

Take = Callable[[str], Any]


def describe(model: Any, arrays: dict[str, Any], cache: Any = None) -> dict[str, Any]:
    """The content that describes a model. Adds the model's arrays to `arrays`, named as `any4_jax.save` says.

    Args:
      model: see `any4_jax.save`.
      arrays: gets the arrays.
      cache: the factory that the model is to carry; None for its own, if it has one.

    Raises:
      TypeError: the model is a Decoder whose class belongs to no family, or there is a cache for another model.
      ValueError: a key isn't a string, or holds "." or "/"; the model contains itself, or is nested too deeply; the
        arrays of an operator don't belong together; the cache isn't in its catalogue, or can't create this model's.
    """
    if cache is not None and not isinstance(model, Decoder):
        raise TypeError(
            f"got a cache for a {type(model).__name__}, and a Decoder is needed, which has caches; leave it out"
        )
    check_nesting(model)
    tree, recipe = container_of(model).tree(model), recipe_of(model)
    carried = default_cache(model) if cache is None else cache
    content = _identity(model) | {
        "tree": describe_tree(tree, "", arrays),
        "recipe": None if recipe is None else recipe_spec(recipe),
        "cache": cache_to_json(carried, arrays),
    }
    if carried is not None:
        check_creates(carried, *_cache_shape(model))
    check_operators(tree)
    return content


def build(content: Mapping[str, Any], take: Take, into: Any = None) -> Any:
    """The inverse of `describe`.

    Args:
      content: what `current` returned.
      take: maps a name to its array, or to a ShapeDtypeStruct that stands for it.
      into: see `any4_jax.load`.

    Raises:
      ValueError: the content contradicts itself or its arrays, or doesn't fit `into`.
    """
    tree, recipe = contents(content, take), recipe_in(content)
    if is_decoder(content):
        return _carrying(_decoder(content, tree, recipe, into), content, take)
    if content["family"] == "hf_flax":
        into = _hf_flax(content, tree, into)
    return tree if into is None else container_of(into).fill(into, tree, recipe)


def current(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The content of a manifest in the form of schema 2, whichever schema it was written in; its types are checked.

    Raises:
      ValueError: it is not what its schema declares.
    """
    upgraded = schema1.upgraded(content)
    check_content(Content2, upgraded)
    return upgraded


def is_described(content: Mapping[str, Any]) -> bool:
    """Whether a manifest's content is that of a model. A caller of `checkpoint.write` may keep anything there."""
    return "tree" in content or "kind" in content


def contents(content: Mapping[str, Any], take: Take) -> Any:
    """Only the tree of arrays and operators; the arrays of each operator belong together.

    Raises:
      ValueError: they don't, or an operator isn't registered.
    """
    tree = build_tree(content["tree"], take)
    check_operators(tree)
    return tree


def taking(arrays: Mapping[str, Any]) -> Take:
    """A function from a name to its array. It raises ValueError if there is none of this name."""

    def take(name: str) -> Any:
        if name not in arrays:
            raise ValueError(
                f"the model's description has the array {shown(name)}, which any4.json lacks; save it again"
            )
        return arrays[name]

    return take


def abstract(manifest: Manifest) -> Take:
    """As `taking`, with the shapes and dtypes of a manifest in place of arrays."""
    return taking({name: jax.ShapeDtypeStruct(a.shape, jnp.dtype(a.dtype)) for name, a in manifest.arrays.items()})


def check_operators(tree: Any) -> None:
    """Raises ValueError unless the arrays of each operator of a tree belong together."""
    for path, leaf in trees.leaves(tree).items():
        if is_operator(leaf):
            check_operator(path, leaf)


def names(content: Mapping[str, Any]) -> Any:
    """The tree with the names of arrays in place of arrays."""
    return build_tree(content["tree"], lambda name: name)


def recipe_in(content: Mapping[str, Any]) -> Recipe | None:
    """How the model was quantized, or None."""
    return None if content["recipe"] is None else recipe_from_spec(content["recipe"])


def is_decoder(content: Mapping[str, Any]) -> bool:
    """Whether the model is a decoder of this library."""
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
    _check_layers(content, tree)
    config, dtype = family.config_from_json(content["config"]), _dtype(content["dtype"])
    if into is not None:
        _check_decoder(into, family, config, dtype)
    try:
        empty = family.abstract(config, dtype)
    # Any number of the config may be one that a module of some family can't be made with.
    except Exception as error:
        raise ValueError(f"its config makes no {family.module.__name__} ({_line(error)}); save it again") from None
    try:
        # The weights may differ in dtype from the activations, and the config doesn't say how.
        return nnx_modules.fill(empty, tree, recipe, declared=False)
    except fitting.Misfit as misfit:
        raise ValueError(
            f"its contents don't fit a {family.module.__name__} of its own config ({misfit.faults}), so it "
            "contradicts itself; save it again"
        ) from None


def _carrying(model: Any, content: Mapping[str, Any], take: Take) -> Any:
    """The decoder with the cache of a content, if there is one."""
    spec = content.get("cache")
    if spec is not None:
        model.cache = DefaultCache(cache_from_json(spec, take, *_cache_shape(model)))
    return model


def _cache_shape(model: Any) -> tuple[int, int, int]:
    return len(model.blocks), model.config.num_key_value_heads, model.config.head_dim


def _hf_flax(content: Mapping[str, Any], tree: Any, into: Any) -> Any:
    """The Hugging Face model that receives the contents of `tree`, or None; see `hf_identity.model_for`."""
    _check_layers(content, tree)
    _dtype(content["dtype"])
    try:
        return hf_identity.model_for(content, into)
    except (ValueError, ImportError):
        raise
    # transformers checks little of a config before it makes a model of it.
    except Exception as error:
        raise ValueError(f"its config makes no Hugging Face model ({_line(error)}); save it again") from None


def _dtype(name: Any) -> Any:
    """The dtype of activations. Raises ValueError unless it is a floating one."""
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        dtype = None
    if name is None or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"its activations have dtype {shown(name)}, and a floating one is needed; save it again")
    return dtype


def _check_layers(content: Mapping[str, Any], tree: Any) -> None:
    """Raises ValueError if the config has more layers than there are arrays: to make such a model takes minutes."""
    layers, stored = (content["config"] or {}).get("num_hidden_layers"), len(trees.leaves(tree))
    if isinstance(layers, int) and layers > stored:
        raise ValueError(
            f"its config has num_hidden_layers={shown(layers)}, and its {stored} arrays and operators are too few for "
            "these; save it again"
        )


def _line(error: Exception) -> str:
    return shown((str(error).splitlines() or [""])[0] or type(error).__name__)


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
