"""`any4 inspect`: what a checkpoint holds, after every byte of it was checked."""

import argparse
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax import checkpoint
from any4_jax.checkpoint import Manifest
from any4_jax.checkpoint.operators import operator_from_spec
from any4_jax.cli.output import megabytes, table


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "inspect", parents=[common], help="what is in a checkpoint; checks its checksums", allow_abbrev=False
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint's folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    manifest = checkpoint.verify(args.checkpoint)
    sizes = {name: math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for name, a in manifest.arrays.items()}
    writer = ", ".join(f"{name} {version}" for name, version in manifest.library.items())
    print(f"{args.checkpoint}: a {manifest.content.get('kind')} checkpoint, written by {writer}")
    print(f"checksums: all {len(manifest.files)} files are as they were written, {len(sizes)} arrays\n")

    recipe = (manifest.content.get("recipe") or {}).get("layers", {})
    rows, stored, weights = [], 0, 0
    for path, operator in _operators(manifest):
        method = (recipe.get(path) or recipe.get(_layer(path)) or {}).get("method", type(operator).__name__)
        shape = " x ".join(map(str, operator.shape))
        rows.append([path, method, f"{operator.bits_per_weight:.3f}", shape, megabytes(operator.nbytes)])
        stored += operator.nbytes
        weights += math.prod(operator.shape)
    if not rows:
        print(f"no layer is quantized; parameters {megabytes(sum(sizes.values()))} MB")
        return 0
    print(table(["layer", "method", "bits/weight", "shape", "MB"], rows))
    print(
        f"\n{len(rows)} layers quantized: {8 * stored / weights:.3f} bits per weight, {megabytes(stored)} MB; "
        f"the other parameters {megabytes(sum(sizes.values()) - stored)} MB"
    )
    for line in sorted({_settings(entry) for entry in recipe.values()}):
        print(line)
    return 0


def _operators(manifest: Manifest) -> Iterator[tuple[str, Any]]:
    """Path and operator of each quantized layer, with shapes in the place of its arrays."""

    def abstract(name: str) -> Any:
        entry = manifest.arrays[name]
        return jax.ShapeDtypeStruct(entry.shape, jnp.dtype(entry.dtype))

    for path, spec in _specs(manifest.content.get("layers", manifest.content.get("tree", {})), ""):
        yield path, operator_from_spec(spec, abstract)


def _layer(place: str) -> str:
    """The name that a recipe has for the layer whose operator is at this place of a tree."""
    return place.removesuffix(".kernel").removeprefix("params.")


def _specs(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The operators' specifications, whether listed by path or nested as a tree."""
    if isinstance(node, Mapping) and "operator" in node:
        yield path, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            # A tree's nodes are wrapped in {"dict": ...}, {"list": ...} and {"leaf": ...}: no part of the path.
            wrapper = len(node) == 1 and key in ("dict", "list", "leaf")
            yield from _specs(value, path if wrapper else f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _specs(value, f"{path}.{index}".lstrip("."))


def _settings(entry: Mapping[str, Any]) -> str:
    """A method with its fields, and what its "auto" settings came to."""
    fields = " ".join(f"{name}={value}" for name, value in entry["fields"].items())
    notes = " ".join(f"{name}={value}" for name, value in entry["notes"].items())
    return f"{entry['method']}: {fields}" + (f" (resolved: {notes})" if notes else "")
