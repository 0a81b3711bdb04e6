"""Save and load a model or a tree of arrays, without ever creating float weights."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

from any4_jax.checkpoint import store
from any4_jax.checkpoint.arrays import ShardingRule
from any4_jax.checkpoint.contents import abstract, build, contents, current, describe, names, taking
from any4_jax.checkpoint.into import placement
from any4_jax.checkpoint.manifest import Manifest
from any4_jax.kv_cache import CacheFactory
from any4_jax.models.hf_flax import is_hf_flax
from any4_jax.models.tokenizer import Tokenizer
from any4_jax.surgery import container_of, linen_modules, trees

_TOKENIZER = "tokenizer/"


def save(path: str | os.PathLike[str], model: Any, *, cache: CacheFactory | None = None) -> None:
    """Write a checkpoint, which replaces the one at `path` as a whole or not at all.

    The manifest, any4.json, holds everything that `load` needs: the model's family and config, its tokenizer's files,
    the operator of each quantized linear, the method with all its fields and notes, and the sha256 of every array and
    file. Arrays are named by dotted path ("layers.0.mlp.up_proj.bias"); those of an operator are named
    "<dotted path of the matrix>/<field>" ("layers.0.mlp.up_proj.kernel/codes").

    Args:
      path: a directory; it may hold an older checkpoint.
      model: quantized or not; a decoder of this library, another NNX module (the state of its random numbers is not
        saved), a Hugging Face Flax model, a Linen pair (module, variables or params), or a nested dict with string
        keys of arrays and operators. The `.tokenizer` of a decoder or a Hugging Face model is saved if it is a
        `Tokenizer` of this library.
      cache: what `generate` and `evaluation` use with the loaded decoder where they are given no other: a `Kivi`, or a
        calibrated `KVQuant`, whose levels are saved too. None keeps the model's own, `DenseCache` drops it.

    Raises:
      TypeError: the model is none of these, or a Decoder whose class belongs to no family; or there is a cache for
        another model than a decoder.
      ValueError: a key or a module's name isn't a string, or holds "." or "/"; a tree contains itself, or is nested
        more than 64 deep; the arrays of an operator don't belong together; the cache isn't in `kv_cache.CATALOGUE`, has
        learned nothing yet, or learned from another model.
      FileExistsError: `path` holds something other than a checkpoint.
      OSError: `path` can't be written, or another save to it is running.
    """
    if not (isinstance(model, nnx.Module | Mapping) or is_hf_flax(model) or linen_modules.is_pair(model)):
        raise TypeError(
            f"got a {type(model).__name__}, and save takes an NNX module, a Hugging Face Flax model, a pair (Linen "
            "module, variables) or a dict of arrays; convert it"
        )
    arrays: dict[str, Any] = {}
    content = describe(model, arrays, cache)
    tokenizer = getattr(model, "tokenizer", None)
    files = tokenizer.files if isinstance(tokenizer, Tokenizer) else {}
    store.write(path, arrays, content, {_TOKENIZER + name: raw for name, raw in files.items()})


def load(path: str | os.PathLike[str], *, into: Any = None, sharding: ShardingRule = None) -> Any:
    """The model of a checkpoint, with every byte checked.

    Args:
      path: a checkpoint that `save` of this version or an earlier one wrote.
      into: a model that the checkpoint's contents fit; it stays as it was. It may hold arrays or ShapeDtypeStructs,
        and may be quantized or not: an NNX module (such as `nnx.eval_shape` returns), a Hugging Face Flax model (also
        one made with _do_init=False), a pair of a Linen module and its abstract variables (None takes whatever the
        checkpoint holds), or a tree of arrays. The checkpoint decides how a linear is quantized; all other arrays must
        have the dtype that they have in `into`, except where these are transformers' abstract parameters, which are
        always float32. A decoder of this library needs the class, config and dtype of the saved one.
      sharding: one jax.sharding.Sharding for all arrays, or a function of (array name, ShapeDtypeStruct) that returns
        one, or None for the default device. By default, arrays follow the NamedShardings of `into`, as
        `any4_jax.checkpoint.into.placement` says; those without go to the default device.

    Returns:
      With `into`, a new model of its kind. Without it, a decoder or a model of `load_hf_flax` is rebuilt from the
      checkpoint alone, with its tokenizer; for other models, the contents: a nested dict of arrays, with operators at
      the key "kernel" of their linears.

    Raises:
      FileNotFoundError: `path` holds no checkpoint.
      ValueError: the checkpoint is damaged (the message names the file), of a newer version, of a family that isn't
        registered, or doesn't fit `into`.
      ImportError: it holds a Hugging Face model, and transformers is absent or has no Flax models.
    """
    if into is not None:
        manifest = store.read_manifest(path)
        with _about(path):
            rule = _rule(manifest, into)
        sharding = rule if sharding is None else sharding
    arrays, content, files = store.read(path, sharding=sharding)
    tokenizer = {name.removeprefix(_TOKENIZER): raw for name, raw in files.items() if name.startswith(_TOKENIZER)}
    with _about(path):
        model = build(current(content), taking(arrays), into)
        if tokenizer and not isinstance(model, Mapping | tuple) and getattr(model, "tokenizer", None) is None:
            model.tokenizer = Tokenizer.from_files(tokenizer)
    return model


def _rule(manifest: Manifest, into: Any) -> ShardingRule:
    """How the arrays are sharded. Raises ValueError if the contents don't fit, before any array is read."""
    content = current(manifest.content)
    take = abstract(manifest)
    build(content, take, into)
    given, named = trees.leaves(contents(content, take)), trees.leaves(names(content))
    return placement(trees.leaves(container_of(into).tree(into)), given, named)


@contextlib.contextmanager
def _about(path: str | os.PathLike[str]) -> Iterator[None]:
    """Names the checkpoint in errors."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from None
