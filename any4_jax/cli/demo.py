"""`any4 demo`: the whole path on a real small model, from float weights to a checkpoint that generates text."""

import argparse
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from any4_jax import checkpoint, models
from any4_jax.cli.errors import WorkError
from any4_jax.cli.numbers import count
from any4_jax.cli.options import build
from any4_jax.cli.output import megabytes, progress, tell
from any4_jax.cli.sources import check_output
from any4_jax.data import assets, texts
from any4_jax.evaluation import Perplexity, paired_difference, perplexity
from any4_jax.generate import generate
from any4_jax.methods import NF4, Any4, Int
from any4_jax.models.degrid import degrid
from any4_jax.surgery import linears, quantized_leaves, resolve
from any4_jax.walk import calibrate, quantize_model

SEQLEN = 256
# Three quarters of the bundled text: the error is well below the differences, and it takes three minutes on two cores.
WINDOWS = 16
NEW_TOKENS = 24
COLUMNS = "{:<8}{:>12}{:>9}{:>10}{:>20}{:>24}"


@dataclass(frozen=True)
class _Subject:
    """The model of the demo, with a text and a prompt of the kind that it was trained on."""

    model: Any
    name: str
    text: str
    prompt: str


@dataclass(frozen=True)
class _Result:
    """One line of the comparison.

    Attributes:
      label: the name of the method.
      stored: bytes of the linears as they are stored.
      weights: number of their weights.
      seconds: to quantize them; None for the float model.
      measured: the perplexity.
      tokens: what the model generated.
    """

    label: str
    stored: int
    weights: int
    seconds: float | None
    measured: Perplexity
    tokens: list[int]


class _Steps:
    """Prints what was done, with the seconds since the last step."""

    def __init__(self) -> None:
        self.begin = self._last = time.perf_counter()

    def lap(self) -> float:
        last, self._last = self._last, time.perf_counter()
        return self._last - last

    def done(self, name: str, text: str) -> None:
        print(f"{name:<10} {self.lap():6.1f} s  {text}", flush=True)


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "demo",
        parents=[common],
        help="quantize a small model, compare methods, save, load, generate",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="any model that `any4 quantize` takes (default: SmolLM2-135M, fetched once)",
    )
    parser.add_argument("--group-size", type=count, default=64, metavar="G", help="(default: 64)")
    parser.add_argument(
        "--windows",
        type=count,
        default=WINDOWS,
        metavar="N",
        help=f"measure on N windows of {SEQLEN} tokens, or as many as the text has (default: {WINDOWS})",
    )
    parser.add_argument("--out", default="any4-demo", metavar="DIR", help="the checkpoint (default: any4-demo)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    methods = {
        "int4": build(Int, args, group_size=args.group_size, zero_point="integer"),
        "nf4": build(NF4, args, group_size=args.group_size),
        "any4": build(Any4, args, group_size=args.group_size),
    }
    check_output(args.out)
    steps = _Steps()
    subject = _subject(args.model, steps)
    model = subject.model
    prompt = model.tokenizer.encode(subject.prompt)
    ids = np.asarray(model.tokenizer.encode(subject.text), np.int32)
    ids = ids[: args.windows * SEQLEN]

    with progress("calibrate", "layer") as bar:
        stats = calibrate(model, texts.prompt(), methods["any4"], progress=bar)
    steps.done("calibrate", f"read one prompt: how strongly each input of {len(linears(model))} linear layers is used")

    print(f"\nQuantized in groups of {args.group_size}, measured on {len(ids) // SEQLEN} windows of {SEQLEN} tokens:")
    print(COLUMNS.format("method", "bits/weight", "MB", "seconds", "perplexity", "nats lost per token"))
    layers = linears(model)
    kernels = [layers[path].kernel[...] for path in resolve(layers, methods["any4"], None)]
    sizes = sum(kernel.nbytes for kernel in kernels), sum(kernel.size for kernel in kernels)
    results = [_measure("float", model, ids, prompt, sizes, None)]
    print(_line(results[0], None), flush=True)
    for label, method in methods.items():
        steps.lap()
        with progress(label, "layer") as bar:
            quantized = quantize_model(model, method, stats=stats if label == "any4" else None, progress=bar)
        leaves = quantized_leaves(quantized).values()
        sizes = sum(leaf.nbytes for leaf in leaves), sizes[1]
        results.append(_measure(label, quantized, ids, prompt, sizes, steps.lap()))
        print(_line(results[-1], results[0]), flush=True)
    print("MB: the linear layers. +-: one standard error over the windows. Lost: against the float model.")
    print(_verdict(results[1:]))

    print(f'\n"{subject.prompt}" goes on, the likeliest token each time:')
    for result in results:
        print(f"  {result.label:<6} {_continuation(model.tokenizer, prompt, result.tokens)}")

    print()
    steps.lap()
    checkpoint.save(args.out, quantized)
    steps.done("save", f"the any4 model to {args.out}")
    loaded = checkpoint.load(args.out)
    steps.done("load", "from the checkpoint alone")
    again = generate(loaded, prompt, max_new_tokens=NEW_TOKENS)
    if again != results[-1].tokens:
        raise WorkError(
            f"{args.out} generates {again}, the model that was saved in it {results[-1].tokens}; report this"
        )
    steps.done("generate", f"the same {len(again)} tokens as before it was saved")
    tell(lambda: {"model": subject.name, "checkpoint": args.out, "methods": [_told(each) for each in results]})
    print(f'\nDone in {time.perf_counter() - steps.begin:.0f} s. Try: any4 generate {args.out} --prompt "..."')
    return 0


def _subject(source: str | None, steps: _Steps) -> _Subject:
    if source is not None:
        subject = _story_teller() if source == "tiny" else _speaker(source, source)
        if subject.model.tokenizer is None:
            raise WorkError(f"{source} has no tokenizer, and the demo reads and writes text; add its tokenizer.json")
        steps.done("model", subject.name)
        return subject
    try:
        path = assets.fetch_smollm2()
    except assets.AssetUnavailable as reason:
        print(f"SmolLM2 can't be had: {reason}.\nA bundled model of 260,000 parameters serves instead.\n")
        subject = _story_teller()
        steps.done("model", subject.name)
        return subject
    subject = _speaker(str(path), "SmolLM2-135M-Instruct, 30 layers (takes a few minutes on two cores)")
    steps.done("model", subject.name)
    subject = replace(subject, model=degrid(subject.model))
    # Why: see degrid. Without it int4 with a free zero point would look perfect.
    steps.done("rescale", "moved its weights off the 4-bit grid they were stored on; it computes the same")
    return subject


def _speaker(source: str, name: str) -> _Subject:
    return _Subject(models.load(source), name, texts.essays(), "Once upon a time, in a small village by the sea,")


def _story_teller() -> _Subject:
    return _Subject(
        models.load("tiny"), "stories260K (bundled)", texts.stories(), "Once upon a time, there was a little"
    )


def _measure(
    label: str, model: Any, ids: np.ndarray, prompt: list[int], sizes: tuple[int, int], seconds: float | None
) -> _Result:
    with progress(f"{label}: perplexity", "window") as bar:
        measured = perplexity(model, ids, seqlen=SEQLEN, progress=bar)
    return _Result(label, *sizes, seconds, measured, generate(model, prompt, max_new_tokens=NEW_TOKENS))


def _line(result: _Result, base: _Result | None) -> str:
    lost = "-"
    if base is not None:
        difference = paired_difference(result.measured, base.measured)
        lost = f"{difference.mean:.4f} +- {difference.error:.4f}"
    return COLUMNS.format(
        result.label,
        f"{8 * result.stored / result.weights:.2f}",
        megabytes(result.stored),
        "-" if result.seconds is None else f"{result.seconds:.1f}",
        f"{result.measured.value:.3f} +- {result.measured.bootstrap():.3f}",
        lost,
    )


def _told(result: _Result) -> dict[str, Any]:
    return {
        "method": result.label,
        "bits_per_weight": 8 * result.stored / result.weights,
        "bytes": result.stored,
        "seconds": result.seconds,
        "perplexity": result.measured.value,
        "standard_error": result.measured.bootstrap(),
        "window_nats_per_token": result.measured.window_nll.tolist(),
        "tokens": list(result.tokens),
    }


def _verdict(results: list[_Result]) -> str:
    """Compares the last result with the best of those before it, on the same windows."""
    *others, last = results
    best = min(others, key=lambda result: result.measured.nll)
    difference = paired_difference(last.measured, best.measured)
    return (
        f"{last.label} against {best.label}, the best of the others: "
        f"{difference.mean:+.4f} +- {difference.error:.4f} nats per token (less is better)."
    )


def _continuation(tokenizer: Any, prompt: list[int], tokens: list[int]) -> str:
    text = tokenizer.decode([*prompt, *tokens]).removeprefix(tokenizer.decode(prompt))
    return " ".join(text.split())
