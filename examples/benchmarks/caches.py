"""Measures what a quantized cache of keys and values costs on a real model, with float weights and with any4's.

    python examples/benchmarks/caches.py --text wiki.test.raw --calibration-text wiki.valid.txt --out caches.json

The model is SmolLM2-135M (fetched once), moved off the 4-bit grid on which it is stored; any4's weights are
dequantized, so that one program serves both. Each token sees keys and values as it would if tokens came one by one.
KVQuant learns from the float model, on --pieces pieces of --calibration-text; without that, on the bundled essays, so
that --text must be given. Everything is in float32.

"nats_lost" and "kl_nats" are against the float model with the plain cache; "top1_share" is the share of tokens on which
both models' likeliest one is the same. "bytes_share": what one row of 8192 tokens takes in bfloat16, against the plain
cache, for the model's heads.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ablation_model import Runner

import any4_jax as a4
from any4_jax import benchmarks, surgery
from any4_jax.benchmarks.files import check_target
from any4_jax.cli.numbers import at_least, count, natural
from any4_jax.cli.output import table
from any4_jax.data import assets, texts
from any4_jax.evaluation import divergence, paired_difference
from any4_jax.kv_cache import DenseCache, Kivi, KVQuant
from any4_jax.methods import Any4
from any4_jax.models import degrid
from any4_jax.weights import is_operator

CASES: dict[str, Any] = {
    "dense": DenseCache,
    "KIVI-4": Kivi(4),
    "KIVI-2": Kivi(2),
    "KVQuant-4": KVQuant(4),
    "KVQuant-3": KVQuant(3),
    "KVQuant-2": KVQuant(2),
    **{f"KVQuant-{bits}, as published": KVQuant(bits, recent=0, refits=0) for bits in (4, 3, 2)},
    "KVQuant-2, newest quantized": KVQuant(2, recent=0),
    "KVQuant-2, no refit": KVQuant(2, refits=0),
    "KVQuant-2, no weights": KVQuant(2, weighting="none"),
    "KVQuant-2, no outliers": KVQuant(2, outliers=0),
    "KVQuant-2, no sinks": KVQuant(2, sinks=0),
}
"""Caches by name: those of the README's table, and what each choice in KVQuant is worth."""
SHOWN = ("weights", "cache", "bytes_share", "perplexity", "nats_lost", "nats_lost_error", "kl_nats", "kl_nats_error")
SHOWN += ("top1_share",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", metavar="REGEX", help="only the caches whose names match")
    parser.add_argument("--weights", nargs="+", choices=("float", "any4"), default=["float", "any4"])
    parser.add_argument("--model", metavar="MODEL", help="any source that any4_jax.models.load takes")
    parser.add_argument("--text", type=Path, metavar="FILE", help="measure on its text (default: the bundled essays)")
    parser.add_argument("--calibration-text", type=Path, metavar="FILE", help="what KVQuant learns from")
    parser.add_argument("--pieces", type=count, default=16, metavar="N", help="of that text (default: 16)")
    parser.add_argument(
        "--windows", type=natural, default=16, metavar="N", help="spread evenly; 0 for all (default: 16)"
    )
    parser.add_argument(
        "--seqlen", type=at_least(2), default=2048, help="tokens in a window and a piece (default: 2048)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results here as JSON, as they come")
    args = parser.parse_args()
    if args.text is None and args.calibration_text is None:
        parser.error("got neither --text nor --calibration-text, and KVQuant must not learn from what is measured")
    if args.out is not None:
        try:
            check_target(args.out)
        except OSError as error:
            parser.error(str(error))
    # A GPU's default, TF32, adds to every figure what no cache is to blame for.
    jax.config.update("jax_default_matmul_precision", "highest")

    source = args.model or str(assets.fetch_smollm2())
    model = degrid.degrid(a4.models.load(source))
    ids = windows(tokens(model, args.text), args.seqlen, args.windows)
    data = a4.data.pieces(tokens(model, args.calibration_text), args.pieces, args.seqlen)
    names = [name for name in CASES if re.search(args.cases, name)]
    caches = {name: calibrated(model, CASES[name], data) for name in names}
    before, rows = Runner(model), []
    for weights in args.weights:
        after = model if weights == "float" else dense(model, a4.quantize_model(model, Any4(), data=texts.prompt()))
        for name, cache in caches.items():
            measured = divergence(before, Runner(after, cache), ids, seqlen=args.seqlen)
            lost = paired_difference(measured.model, measured.reference)
            rows.append(
                {
                    "weights": weights,
                    "cache": name,
                    "settings": str(getattr(cache, "__name__", cache)),
                    "bytes_share": size(model, cache) / size(model, DenseCache),
                    "perplexity": measured.model.value,
                    "nats_lost": lost.mean,
                    "nats_lost_error": lost.error,
                    "kl_nats": measured.kl,
                    "kl_nats_error": measured.bootstrap(),
                    "top1_share": measured.top1,
                }
            )
            print("  ".join(shown(rows[-1][key]) for key in SHOWN), file=sys.stderr, flush=True)
            if args.out:
                command, used = ["python", *sys.argv], settings(args, source)
                benchmarks.write(args.out, benchmarks.result("caches", command, settings=used, rows=rows))
    print(table(SHOWN, [[shown(row[key]) for key in SHOWN] for row in rows]))


def settings(args: argparse.Namespace, source: str) -> dict[str, Any]:
    """What the rows were measured with."""
    files = {name: file.name if file else "essays" for name, file in vars(args).items() if name.endswith("text")}
    return files | {"model": Path(source).name, "seqlen": args.seqlen, "windows": args.windows, "pieces": args.pieces}


def tokens(model: Any, file: Path | None) -> np.ndarray:
    """The tokens of a text, int32 [tokens]."""
    text = texts.essays() if file is None else file.read_text(encoding="utf-8")
    return np.asarray(model.tokenizer.encode(text), np.int32)


def windows(ids: np.ndarray, seqlen: int, wanted: int) -> np.ndarray:
    """The tokens of windows that are spread evenly over a text, as in ablations.py."""
    found = ids[: len(ids) // seqlen * seqlen].reshape(-1, seqlen)
    wanted = wanted or len(found)
    return found[:: max(1, len(found) // wanted)][:wanted].reshape(-1)


def calibrated(model: Any, cache: Any, data: np.ndarray) -> Any:
    """The cache, after it has learned from the float model if it does."""
    if not hasattr(cache, "calibrated"):
        return cache
    return a4.calibrate_cache(model, cache, data, seqlen=data.shape[1])


def dense(model: Any, quantized: Any) -> Any:
    """The quantized model as one of the float model's form, so that one program runs both."""

    def of(leaf: Any) -> Any:
        return jnp.asarray(np.asarray(_dense(leaf)).T) if is_operator(leaf) else leaf

    container = surgery.container_of(quantized)
    return container.fill(model, jax.tree.map(of, container.tree(quantized), is_leaf=is_operator), None)


_dense = jax.jit(a4.dequantize)


def size(model: Any, cache: Any) -> int:
    """Bytes of the caches of all blocks, in bfloat16, of one row of 8192 tokens."""
    arrays = jax.eval_shape(lambda: model.init_cache(1, 8192, dtype=jnp.bfloat16, cache=cache))
    return sum(each.size * each.dtype.itemsize for each in jax.tree.leaves(arrays))


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
