"""The flags --cache and --cache-...: what keeps keys and values, with the fields of the cache."""

import argparse
import dataclasses
import sys
from collections.abc import Collection
from typing import Any

from any4_jax.cli.errors import CommandLineError, WorkError
from any4_jax.cli.options import add_fields, build, given, given_values
from any4_jax.data import pieces, texts
from any4_jax.kv_cache import CATALOGUE, CacheFactory, DenseCache, default_cache
from any4_jax.models import Decoder
from any4_jax.walk import calibrate_cache

_PREFIX = "cache-"
# What a cache learns from where no checkpoint has it: so many pieces of the bundled essays, of so many tokens.
_PIECES, _TOKENS = 4, 512


def add_cache(
    parser: argparse.ArgumentParser, skipped: Collection[str] = (), unset: str = "as the checkpoint was saved, or dense"
) -> None:
    """Adds the flags.

    Args:
      parser: gets them.
      skipped: fields that get none.
      unset: what is used without --cache.
    """
    parser.add_argument(
        "--cache",
        choices=("dense", *CATALOGUE),
        help="how keys and values are kept: dense, in the model's dtype, or quantized; kvquant learns from a text "
        f"(default: {unset})",
    )
    seen = set(skipped)
    for kind in CATALOGUE.values():
        # A flag that several have is the first one's; each checks what it gets.
        add_fields(parser, kind, _PREFIX, seen | set(getattr(kind, "TABLES", ())))
        seen |= {field.name for field in dataclasses.fields(kind)}


def cache_from(args: argparse.Namespace) -> Any:
    """The cache of the command line, before it has learned anything; None if none is named.

    Raises:
      CommandLineError: its fields don't fit, or are given for another one.
    """
    kind = CATALOGUE.get(args.cache)
    own = set() if kind is None else set(given(kind, args, _PREFIX))
    for flag in (flag for each in CATALOGUE.values() for flag in given(each, args, _PREFIX)):
        if flag not in own:
            owners = [f"--cache {name}" for name, each in CATALOGUE.items() if flag in given(each, args, _PREFIX)]
            raise CommandLineError(
                f"got {flag} without {' or '.join(owners)}, whose field it is; add that, or leave it out"
            )
    if kind is None:
        return None if args.cache is None else DenseCache
    return build(kind, args, _PREFIX)


def cache_words(args: argparse.Namespace) -> str | None:
    """The cache that the command line asks for, as words of one: "kivi bits=2"; None without --cache."""
    kind = CATALOGUE.get(args.cache)
    if kind is None:
        return args.cache
    values = given_values(kind, args, _PREFIX)
    return " ".join([args.cache, *(f"{name}={values[name]}" for name in sorted(values))])


def cache_for(model: Decoder, args: argparse.Namespace, cache: Any) -> CacheFactory | None:
    """What `cache_from` gave, ready for a model. None is the checkpoint's own, if it has one; and one that learns is
    the checkpoint's if that has the fields of the command line, or learns from the bundled essays.

    Raises:
      WorkError: it has to learn, and the model has no tokenizer.
    """
    carried: Any = default_cache(model)
    if cache is None:
        return carried
    if not hasattr(cache, "calibrated"):
        return cache
    names = [flag.removeprefix(f"--{_PREFIX}").replace("-", "_") for flag in given(type(cache), args, _PREFIX)]
    if type(carried) is type(cache) and all(getattr(carried, name) == getattr(cache, name) for name in names):
        return carried
    if model.tokenizer is None:
        raise WorkError(
            f"{args.model} has no tokenizer, and --cache {args.cache} has to learn from a text; give a checkpoint that "
            f"was made with --cache {args.cache}, or add its tokenizer.json"
        )
    length = min(_TOKENS, model.config.max_position_embeddings)
    print(f"calibrating the cache on {_PIECES} x {length} tokens of the bundled essays", file=sys.stderr)
    return calibrate_cache(model, cache, pieces(model.tokenizer.encode(texts.prose()), _PIECES, length))
