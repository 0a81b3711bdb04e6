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
from any4_jax.checkpoint.contents import build, contents, current, describe
from any4_jax.checkpoint.into import placement
from any4_jax.checkpoint.manifest import Manifest
from any4_jax.models.hf_flax import is_hf_flax
from any4_jax.models.tokenizer import Tokenizer
from any4_jax.surgery import container_of, linen_modules, trees

_TOKENIZER = "tokenizer/"


def save(path: str | os.PathLike[str], model: Any) -> None:
    """Writes a checkpoint; replaces the one at `path` as a whole or not at all.

    The manifest, any4.json, says everything that `load` needs: the model's family and config, its tokenizer's files,
    for each quantized layer the operator, the method with all its fields and notes, and the sha256 of every array and
    file. Arrays are named by their dotted path ("layers.0.mlp.up_proj.bias"), those of an operator
    "<dotted path of the matrix>/<field>" ("layers.0.mlp.up_proj.kernel/codes").

    Args:
      path: a directory; it may hold an older checkpoint.
      model: quantized or not, a decoder of this library, another NNX module (the state of its random numbers is not
        saved), a Hugging Face Flax model, a Linen pair (module, variables or params), or a dict (nested, string keys)
        of arrays and operators. The `.tokenizer` of a decoder or Hugging Face model is saved if it is one of this
        library.

    Raises:
      TypeError: another model; a Decoder of a class that no family has.
      ValueError: keys or names of modules that are no strings, or hold "." or "/".
      FileExistsError, OSError: `path` holds other things, can't be written, or another save to it is running.
    """
    if not (isinstance(model, nnx.Module | Mapping) or is_hf_flax(model) or linen_modules.is_pair(model)):
        raise TypeError(
            f"got a {type(model).__name__}, save takes an NNX module, a Hugging Face Flax model, a pair (Linen module, "
            "variables) or a dict of arrays; convert it"
        )
    arrays: dict[str, Any] = {}
    content = describe(model, arrays)
    tokenizer = getattr(model, "tokenizer", None)
    files = tokenizer.files if isinstance(tokenizer, Tokenizer) else {}
    store.write(path, arrays, content, {_TOKENIZER + name: raw for name, raw in files.items()})


def load(path: str | os.PathLike[str], *, into: Any = None, sharding: ShardingRule = None) -> Any:
    """The model of a checkpoint, every byte checked.

    Args:
      path: what `save` wrote, in this version or an earlier one.
      into: a model that the checkpoint's contents fit, which stays as it was. It may hold arrays or
        ShapeDtypeStructs and be quantized or not: an NNX module (such as `nnx.eval_shape` gives), a Hugging Face Flax
        model (made with _do_init=False, too), a pair (Linen module, abstract variables, or None for whatever the
        checkpoint holds), or a tree of arrays. How a layer is quantized is what the checkpoint says; other arrays need
        the dtype that `into` gives them (transformers' abstract parameters, which say float32 of everything, give
        none). For a decoder of this library, a decoder of the same class, config and dtype.
      sharding: one jax.sharding.Sharding for all arrays, or a function of (array name, ShapeDtypeStruct) that gives
        one or None for the default device. None follows the NamedShardings of `into`, see
        `any4_jax.checkpoint.into.placement`; the default device where it has none.

    Returns:
      With `into`, a new model like it. Without, a decoder, or the Hugging Face model that `load_hf_flax` once made,
      with its tokenizer, rebuilt from the checkpoint alone; of other models you get the contents: a nested dict of
      arrays, with operators at the key "kernel" of their layers.

    Raises:
      FileNotFoundError: no checkpoint there.
      ValueError: a damaged one (the file is named), one of a newer version or of a family that isn't registered, or one
        that doesn't fit `into`.
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
        model = build(current(content), arrays.__getitem__, into)
        if tokenizer and not isinstance(model, Mapping | tuple) and getattr(model, "tokenizer", None) is None:
            model.tokenizer = Tokenizer.from_files(tokenizer)
    return model


def _rule(manifest: Manifest, into: Any) -> ShardingRule:
    """Where the arrays go; raises ValueError for a misfit, before anything is read."""
    content = current(manifest.content)
    shapes = {name: jax.ShapeDtypeStruct(a.shape, jnp.dtype(a.dtype)) for name, a in manifest.arrays.items()}
    build(content, shapes.__getitem__, into)
    given, names = (trees.leaves(contents(content, take)) for take in (shapes.__getitem__, lambda name: name))
    return placement(trees.leaves(container_of(into).tree(into)), given, names)


@contextlib.contextmanager
def _about(path: str | os.PathLike[str]) -> Iterator[None]:
    """Names the checkpoint in errors."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from None
