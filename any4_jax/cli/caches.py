"""The flags --cache and --cache-...: what keeps keys and values, with the fields of the cache."""

import argparse
from collections.abc import Collection

from any4_jax.cli.errors import CommandLineError
from any4_jax.cli.options import add_fields, build, given
from any4_jax.kv_cache import CacheFactory
from any4_jax.kv_cache.kivi import Kivi

_PREFIX = "cache-"


def add_cache(parser: argparse.ArgumentParser, skipped: Collection[str] = ()) -> None:
    """Adds the flags; `skipped` are fields that get none."""
    parser.add_argument(
        "--cache",
        choices=("dense", "kivi"),
        default="dense",
        help="how keys and values are kept: in the model's dtype (default), or quantized as KIVI does",
    )
    add_fields(parser, Kivi, _PREFIX, skipped)


def cache_from(args: argparse.Namespace) -> CacheFactory | None:
    """The cache of the command line, None for the plain one.

    Raises:
      CommandLineError: its fields don't fit, or are given for the plain one.
    """
    if args.cache == "kivi":
        return build(Kivi, args, _PREFIX)
    if flags := given(Kivi, args, _PREFIX):
        raise CommandLineError(f"got {flags[0]} without --cache kivi, whose field it is; add that, or leave it out")
    return None
