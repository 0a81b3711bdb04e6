"""What `any4 eval` measures on texts: perplexity, and the divergence from another model."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from any4_jax.cli.errors import WorkError
from any4_jax.cli.output import progress, table
from any4_jax.cli.token_files import read_tokens
from any4_jax.evaluation import CORPORA, Divergence, Perplexity, Tokens, divergence, perplexity, read_corpus

SEQLEN = 2048


def measure(name: str, tokens: Tokens, model: Any, against: Any, **settings: Any) -> dict[str, Any]:
    """The result of a text, for results.json.

    Args:
      name: of the text.
      tokens: its own.
      model: what is measured.
      against: the model that it is compared with, or None.
      settings: of `perplexity`.
    """
    with progress(name, "window") as bar:
        if against is None:
            result = _of_perplexity(perplexity(model, tokens.ids, progress=bar, **settings))
        else:
            both = divergence(against, model, tokens.ids, progress=bar, **settings)
            result = _of_perplexity(both.model) | {"against": _of_divergence(both)}
    return result | {"source": dict(tokens.source)}


def tokens_of(name: str, args: argparse.Namespace, models: Sequence[Any], seqlen: int) -> Tokens:
    """The tokens of a task or file, which are the same for all models.

    Raises:
      WorkError: they can't be had, or are not the same.
    """

    def read(tokenizer: Any) -> Tokens:
        if name not in CORPORA or name in args.text:
            return read_tokens(name, tokenizer, args.field)
        if tokenizer is None:
            raise WorkError(f"{args.model} has no tokenizer, and {name} is a text; add its tokenizer.json")
        try:
            return read_corpus(name, tokenizer, seqlen, windows=args.windows, folder=args.datasets)
        except ImportError as error:
            raise WorkError(str(error)) from error

    first, *others = models
    tokens = read(first.tokenizer)
    for other in others:
        if other.tokenizer != first.tokenizer and not np.array_equal(read(other.tokenizer).ids, tokens.ids):
            raise WorkError(
                f"the tokenizers of {args.model} and {args.against} give different tokens for {name}, and a comparison "
                "needs the same ones; give models that share a tokenizer"
            )
    return tokens


def shown(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of results, by text."""
    text = table(*_summary(found))
    against = {name: r["against"]["position_kl_nats"] for name, r in found.items() if "against" in r}
    if not against:
        return text
    by_position = table(*_by_position(against))
    return f"{text}\n\nKL in nats per token by the position in a window, and over all positions:\n{by_position}"


def _summary(found: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["text", "perplexity", "error", "nats/token", "windows"]
    rows = [
        [
            name,
            f"{r['perplexity']:.4f}",
            f"{r['standard_error']:.4f}",
            f"{r['nats_per_token']:.5f}",
            f"{r['windows']} x {r['seqlen']}",
        ]
        for name, r in found.items()
    ]
    if all("against" in r for r in found.values()):
        header += ["KL nats/token", "error", "99%", "top-1 agreement", "flips"]
        for row, compared in zip(rows, (r["against"] for r in found.values()), strict=True):
            row += [f"{compared['kl_nats_per_token']:.5f}", f"{compared['kl_standard_error']:.5f}"]
            row += [f"{compared['kl_99_percent_nats']:.5f}", f"{compared['top1_agreement']:.2%}"]
            row += [f"{compared['flips']:.2%}"]
    return header, rows


def _by_position(found: Mapping[str, Sequence[float]]) -> tuple[list[str], list[list[str]]]:
    """A table of mean KLs over ranges of positions that double, and over all."""
    length = max(map(len, found.values()))
    starts = [0, *(2**power for power in range(4, length.bit_length()) if 2**power < length)]
    ends = [*starts[1:], length]
    header = ["text", *(f"{start + 1}-{end}" for start, end in zip(starts, ends, strict=True)), "all"]
    rows = []
    for name, values in found.items():
        parts = [*(values[start:end] for start, end in zip(starts, ends, strict=True)), values]
        rows.append([name, *(f"{np.mean(part):.5f}" for part in parts)])
    return header, rows


def _of_perplexity(measured: Perplexity) -> dict[str, Any]:
    return {
        "perplexity": measured.value,
        "standard_error": measured.bootstrap(),
        "nats_per_token": measured.nll,
        "windows": len(measured.window_nll),
        "seqlen": measured.seqlen,
        "window_nats_per_token": measured.window_nll.tolist(),
    }


def _of_divergence(measured: Divergence) -> dict[str, Any]:
    return {
        "kl_nats_per_token": measured.kl,
        "kl_standard_error": measured.bootstrap(),
        "kl_99_percent_nats": measured.kl_quantile(0.99),
        "top1_agreement": measured.top1,
        "flips": measured.flips,
        "flips_lost": measured.lost,
        "flips_won": measured.won,
        "perplexity": measured.reference.value,
        "nats_per_token": measured.reference.nll,
        "window_kl_nats_per_token": measured.window_kl.tolist(),
        "window_top1_agreement": measured.window_top1.tolist(),
        "position_kl_nats": measured.position_kl.tolist(),
        "position_top1_agreement": measured.position_top1.tolist(),
    }
