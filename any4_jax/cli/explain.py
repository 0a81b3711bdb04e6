"""`any4 explain`: which kernel each linear, and attention over the cache, runs on here, and why."""

import argparse
from typing import Any

from any4_jax.cli.caches import add_cache, cache_from
from any4_jax.cli.numbers import count
from any4_jax.cli.output import tell
from any4_jax.cli.sources import MODEL_HELP, open_any
from any4_jax.kv_cache import KVQuant
from any4_jax.models import Decoder
from any4_jax.surgery import explained


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "explain", parents=[common], help="which kernel each layer runs on here, and why", allow_abbrev=False
    )
    parser.add_argument("model", metavar="CKPT_OR_MODEL", help=f"a checkpoint, {MODEL_HELP}")
    parser.add_argument("--rows", type=count, default=1, metavar="M", help="rows of the input; 1 is decoding (default)")
    add_cache(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    cache, model = cache_from(args), open_any(args.model)
    if isinstance(cache, KVQuant) and isinstance(model, Decoder):
        # Kernels don't depend on what it learned.
        config = model.config
        cache = cache.stand_in(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    found = explained(model, rows=args.rows, cache=cache)
    print(found)
    tell(
        lambda: {
            "model": args.model,
            "rows": args.rows,
            "platform": found.platform,
            "groups": [
                {"layers": [{"path": path, "count": count} for path, count in places.items()]}
                | {"backends": text.splitlines()}
                for text, places in found.layers.items()
            ],
            "attention": found.attention,
        }
    )
    return 0
