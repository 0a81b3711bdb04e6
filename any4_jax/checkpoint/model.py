"""Save and load: a model or a tree of arrays to a checkpoint and back, never through float weights."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from any4_jax.checkpoint import store
from any4_jax.checkpoint.arrays import ShardingRule
from any4_jax.checkpoint.into import placement
from any4_jax.checkpoint.llama import build_llama, check_llama, describe_llama
from any4_jax.checkpoint.manifest import Manifest
from any4_jax.checkpoint.operators import operator_from_spec
from any4_jax.checkpoint.trees import build_tree, describe, recipe_in
from any4_jax.models import flax_llama, hf_flax
from any4_jax.models.llama import Llama
from any4_jax.models.tokenizer import Tokenizer
from any4_jax.surgery import container_of, linen_modules, trees

_TOKENIZER = "tokenizer/"


def save(path: str | os.PathLike[str], model: Any) -> None:
    """Writes a checkpoint, replacing the one at `path` as a whole or not at all.

    The manifest, any4.json, says everything that `load` needs: the model's shape, its tokenizer's files, for each
    quantized layer the operator, the method with all its fields and what "auto" settings came to, and the sha256 of
    every array and file. Arrays are named "<path of the layer>/<field>", other parameters by their dotted path; in
    models of the user's, whose quantized layers are named by their "kernel", "<path of the kernel>/<field>".

    Args:
      path: a directory; it may hold an older checkpoint.
      model: quantized or not, a Llama of this library, another NNX module (the state of its random numbers is not
        saved), a Hugging Face Flax model, a Linen pair (module, variables or params), or a dict (nested, string keys)
        of arrays and operators. A Llama's or Hugging Face model's `.tokenizer` is saved if it is one of this library.

    Raises:
      TypeError: a model of another kind.
      ValueError: keys or names of modules that are no strings, or hold "." or "/".
      FileExistsError, OSError: `path` holds other things, can't be written, or another save to it is running.
    """
    arrays: dict[str, Any] = {}
    if isinstance(model, Llama):
        content = describe_llama(model, arrays)
    elif isinstance(model, nnx.Module | Mapping) or hf_flax.is_hf_flax(model) or linen_modules.is_pair(model):
        content = describe(model, arrays)
    else:
        raise TypeError(
            f"got a {type(model).__name__}, save takes an NNX module, a Hugging Face Flax model, a pair (Linen module, "
            "variables) or a dict of arrays; convert it"
        )
    tokenizer = getattr(model, "tokenizer", None)
    files = tokenizer.files if isinstance(tokenizer, Tokenizer) else {}
    store.write(path, arrays, content, {_TOKENIZER + name: raw for name, raw in files.items()})


def load(path: str | os.PathLike[str], *, into: Any = None, sharding: ShardingRule = None) -> Any:
    """The model of a checkpoint, every byte checked.

    Args:
      path: what `save` wrote.
      into: a model that the checkpoint's contents fit, which stays as it was. It may hold arrays or
        ShapeDtypeStructs and be quantized or not: an NNX module (such as `nnx.eval_shape` gives), a Hugging Face Flax
        model (made with _do_init=False, too), a pair (Linen module, abstract variables, or None for whatever the
        checkpoint holds), or a tree of arrays. How a layer is quantized is what the checkpoint says, other arrays
        have to have the dtype that `into` gives them (transformers' abstract parameters, which say float32 of
        everything, give none). For a Llama of this library, a Llama of the same config.
      sharding: one jax.sharding.Sharding for all arrays, or a function of (array name, ShapeDtypeStruct) that gives
        one or None for the default device. None follows the NamedShardings of `into`, see
        `any4_jax.checkpoint.into.placement`; the default device where it has none.

    Returns:
      With `into`, a new model of that kind. Without, a Llama, or the Hugging Face model that `load_hf_flax` once
      made, is made anew, with its tokenizer; of other models you get the contents: a nested dict of arrays, with
      operators at the key "kernel" of their layers.

    Raises:
      FileNotFoundError: no checkpoint there.
      ValueError: a damaged one (the file is named), one of a newer version, or one that doesn't fit `into`.
      ImportError: a Hugging Face model, and transformers is absent or of a version without Flax models.
    """
    if into is not None:
        manifest = store.read_manifest(path)
        with _about(path):
            rule = _rule(manifest, into)
        sharding = rule if sharding is None else sharding
    arrays, content, files = store.read(path, sharding=sharding)
    tokenizer = {name.removeprefix(_TOKENIZER): raw for name, raw in files.items() if name.startswith(_TOKENIZER)}
    with _about(path):
        model = _build(content, arrays, into)
        if tokenizer and not isinstance(model, Mapping | tuple) and getattr(model, "tokenizer", None) is None:
            model.tokenizer = Tokenizer.from_files(tokenizer)
    return model


def _build(content: Mapping[str, Any], arrays: Mapping[str, Any], into: Any) -> Any:
    """The model that `content` describes."""
    if _kind(content) == "llama":
        with _parsing():
            return build_llama(content, arrays)
    with _parsing():
        tree, recipe, made_of = build_tree(content["tree"], arrays.__getitem__), recipe_in(content), _made_of(content)
    if into is None and made_of.get("repaired"):
        with _parsing():
            into = flax_llama.abstract_flax_llama(made_of["config"], made_of["dtype"])
            into.generation_config = type(into.generation_config).from_dict(made_of["generation"])
            into.tokenizer = None
    return tree if into is None else container_of(into).fill(into, tree, recipe)


def _rule(manifest: Manifest, into: Any) -> ShardingRule:
    """Where the arrays go; refuses a misfit before anything is read."""
    content = manifest.content
    shapes = {name: jax.ShapeDtypeStruct(a.shape, jnp.dtype(a.dtype)) for name, a in manifest.arrays.items()}
    with _parsing():
        given, names = _leaves(content, shapes), _leaves(content, {name: name for name in shapes})
    if _kind(content) == "llama":
        check_llama(content, into)
    else:
        if _made_of(content).get("repaired") and hf_flax.is_hf_flax(into) and not flax_llama.is_repaired(into):
            raise ValueError(
                "it was made by a FlaxLlama of any4_jax.models.load_hf_flax, and `into`, which lacks its repairs, "
                "might compute something else; leave `into` out, or pass one of load_hf_flax"
            )
        _build(content, shapes, into)
    return placement(trees.leaves(container_of(into).tree(into)), given, names)


def _leaves(content: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoint holds by the dotted paths of `Kind.tree`."""
    if _kind(content) == "tree":
        return trees.leaves(build_tree(content["tree"], arrays.__getitem__))
    layers = {
        f"{path}.kernel": operator_from_spec(spec, arrays.__getitem__) for path, spec in content["layers"].items()
    }
    return layers | {name: arrays[name] for name in content["parameters"]}


def _kind(content: Mapping[str, Any]) -> str:
    if content.get("kind") not in ("llama", "tree"):
        raise ValueError(f"it holds a {content.get('kind')!r}, this version loads llama and tree; upgrade any4_jax")
    return content["kind"]


def _made_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `describe` said of the model; nothing in checkpoints of trees, and in old ones."""
    return content.get("model") or {}


@contextlib.contextmanager
def _about(path: str | os.PathLike[str]) -> Iterator[None]:
    """Names the checkpoint in errors."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from None


@contextlib.contextmanager
def _parsing() -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError) as error:
        raise ValueError(f"any4.json lacks or misnames {error}; save it again") from error
