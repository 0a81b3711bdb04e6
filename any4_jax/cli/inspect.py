"""`any4 inspect`: what a checkpoint holds, after checking every byte of it."""

import argparse
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from any4_jax import checkpoint
from any4_jax.checkpoint import Manifest
from any4_jax.checkpoint.contents import abstract, contents, current, is_described
from any4_jax.cli.output import megabytes, table, tell
from any4_jax.cli.stored_sizes import Layer, compared, histogram, size_table
from any4_jax.surgery import coverage, quantized_leaves
from any4_jax.weights import LowRank, Sum


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "inspect", parents=[common], help="what is in a checkpoint; checks its checksums", allow_abbrev=False
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint's folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    manifest = checkpoint.verify(args.checkpoint)
    content = current(manifest.content) if is_described(manifest.content) else {}
    sizes = {name: math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for name, a in manifest.arrays.items()}
    writer = ", ".join(f"{name} {version}" for name, version in manifest.library.items())
    print(f"{args.checkpoint}: {_subject(content)}, written by {writer}")
    print(f"checksums: all {len(manifest.files)} files are as they were written, {len(sizes)} arrays")
    if cache := content.get("cache"):
        print(f"cache: {cache['cache']}, {', '.join(f'{name} {value}' for name, value in cache['fields'].items())}")
    print()

    recipe = (content.get("recipe") or {}).get("linears", {})
    layers = [_layer(place, operator, content, recipe) for place, operator in _operators(content, manifest).items()]
    rest = sum(sizes.values()) - sum(layer.nbytes for layer in layers)
    tell(
        lambda: {
            "checkpoint": args.checkpoint,
            "family": content.get("family"),
            "library": dict(manifest.library),
            "files": len(manifest.files),
            "arrays": len(sizes),
            "layers": [dataclasses.asdict(layer) | {"bits_per_weight": layer.bits} for layer in layers],
            "sizes": [dataclasses.asdict(size) for size in compared(layers)],
            "other_bytes": rest,
            "recipe": recipe,
        }
    )
    if not layers:
        print(f"no layer is quantized; parameters {megabytes(rest)} MB")
        return 0
    rows = [
        [layer.name, layer.method, f"{layer.bits:.3f}", " x ".join(map(str, layer.shape)), megabytes(layer.nbytes)]
        for layer in layers
    ]
    print(table(["layer", "method", "bits/weight", "shape", "MB"], rows))
    print(f"\n{size_table(layers, rest)}\n\n{histogram(layers)}")
    updates, weights = (sum(getattr(layer, name) for layer in layers) for name in ("lora_bytes", "weights"))
    stored = sum(layer.nbytes for layer in layers)
    of_these = f" ({megabytes(updates)} MB of them LoRA)" if updates else ""
    print(
        f"\n{len(rows)} layers quantized: {8 * stored / weights:.3f} bits per weight, {megabytes(stored)} MB{of_these}"
        f"; the other parameters {megabytes(rest)} MB"
    )
    print(coverage(contents(content, abstract(manifest))))
    for line in _settings(recipe.values()):
        print(line)
    for each in (content.get("recipe") or {}).get("training", ()):
        told = "".join(f" {name}={_short(value)}" for name, value in each["settings"].items())
        print(f"trained ({each['by']}) on {each['tokens']} tokens" + (f":{told}" if told else ""))
    return 0


def _layer(place: str, operator: Any, content: Mapping[str, Any], recipe: Mapping[str, Any]) -> Layer:
    named = next((name for name in _names(place) if name in recipe), None)
    base, added = _split(operator)
    method = type(base).__name__ if named is None else recipe[named]["method"]
    method += "".join(f" + LoRA rank {update.a.shape[-2]}" for update in added)
    lora = sum(update.nbytes for update in added)
    return Layer(_shown(place, content), method, tuple(operator.shape), operator.nbytes, lora)


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _operators(content: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    """The operator of each quantized matrix, with shapes in place of arrays, by its place in the tree."""
    return quantized_leaves(contents(content, abstract(manifest))) if content else {}


def _split(operator: Any) -> tuple[Any, list[LowRank]]:
    """What a method made of a matrix, and the low-rank update that `add_lora` added to it, if any."""
    if isinstance(operator, Sum) and isinstance(operator.terms[-1], LowRank) and len(operator.terms) == 2:
        return operator.terms[0], [operator.terms[1]]
    return operator, []


def _subject(content: Mapping[str, Any]) -> str:
    """The model's family and class. A caller of `checkpoint.write` may describe its arrays without either."""
    made = (content.get("model") or {}).get("class")
    return f"family {content.get('family')}" + (f" ({made})" if made else "")


def _names(place: str) -> tuple[str, ...]:
    """The names that a recipe may use for the linear whose operator is at this place in the tree."""
    inner = place.removeprefix("params.")
    return place, inner, inner.rpartition(".")[0]


def _shown(place: str, content: Mapping[str, Any]) -> str:
    """The name to show: the linear's path; for Hugging Face models, Linen variables and plain trees, the place in the
    tree."""
    if content["family"] in ("hf_flax", "linen", "tree"):
        return place
    return place.rpartition(".")[0] or place


def _settings(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line per method, with its fields and the values that its "auto" settings resolved to. Numbers that differ
    from linear to linear, such as a searched exponent, are shown as the range that they span."""
    found: dict[str, dict[str, list[float]]] = {}
    for entry in entries:
        numbers = {name: _numbers(note) for name, note in entry["notes"].items()}
        words = " ".join(f"{name}={note}" for name, note in entry["notes"].items() if not numbers[name])
        line = f"{entry['method']}: {_fields(entry)}" + (f" (resolved: {words})" if words else "")
        ranges = found.setdefault(line, {})
        for name, values in numbers.items():
            if values:
                ranges.setdefault(name, []).extend(values)
    return [line + "".join(_range(*item) for item in found[line].items()) for line in sorted(found)]


def _fields(entry: Mapping[str, Any]) -> str:
    """The fields of a method as text; the fields of an inner method are in parentheses."""
    shown = {
        name: f"{value['method']}({_fields(value)})" if isinstance(value, Mapping) else value
        for name, value in entry["fields"].items()
    }
    return " ".join(f"{name}={value}" for name, value in shown.items())


def _numbers(note: Any) -> list[float]:
    """The number or numbers of a note; empty if it is a word or a bool."""
    values = note if isinstance(note, list) else [note]
    return values if all(type(value) in (int, float) for value in values) else []


def _range(name: str, values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"; {name} {low:.4g}" + (f" to {high:.4g}" if low < high else "")
