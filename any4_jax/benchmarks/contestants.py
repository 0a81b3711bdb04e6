"""What takes part in a measurement of decoding: models on engines, and which of them fit in memory together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from any4_jax.benchmarks import shapes
from any4_jax.benchmarks.timing import tree_bytes
from any4_jax.generate import generate_tokens
from any4_jax.methods import AnyMethod
from any4_jax.models.base import Decoder
from any4_jax.nn.nnx import Any4Embed
from any4_jax.surgery import quantize_inputs, quantized_leaves
from any4_jax.weights import QuantizeInput, parts


@dataclass(frozen=True)
class Contestant:
    """A model on an engine.

    Attributes:
      run: (prompts int [B, T], number of new tokens) -> the new tokens of each row, in chunks as they are decoded; the
        first chunk is the one token that follows each prompt.
      read_bytes: bytes of weights that each step reads.
      vocabulary: token ids are below this.
      facts: columns of its row: the model, the method, ...
      context: the most tokens of a prompt and its continuation; None for no limit.
    """

    run: Callable[[np.ndarray, int], Iterator[list[list[int]]]]
    read_bytes: int
    vocabulary: int
    facts: Mapping[str, Any]
    context: int | None = None


@dataclass(frozen=True)
class Entry:
    """A contestant that may not exist yet.

    Attributes:
      create: makes the contestant.
      nbytes: the memory that this takes: of its weights, or 0 if they are there already.
      context: see `Contestant`.
    """

    create: Callable[[], Contestant]
    nbytes: int
    context: int | None = None

    @classmethod
    def of(cls, contestant: Contestant) -> "Entry":
        """One that exists."""
        return cls(lambda: contestant, 0, contestant.context)


def labels(names: Sequence[str]) -> dict[str, str]:
    """What rows call models, by the names of different files, folders or hub ids: as many of the last parts of the path
    as tell them apart."""
    paths = [Path(name).parts or (name,) for name in names]
    for count in range(1, max(map(len, paths), default=0) + 1):
        found = [str(Path(*parts[-count:])) for parts in paths]
        if len(set(found)) == len(found):
            return dict(zip(names, found, strict=True))
    return {name: name for name in names}


def contestant(label: str, model: Decoder) -> Contestant:
    """A model of this library, decoded by the loop of `generate`; its row shows the label."""

    def chunks(prompts: np.ndarray, tokens: int) -> Iterator[list[list[int]]]:
        # eos=(): an end-of-text token doesn't stop the loop, so that all contestants decode equally many tokens.
        return generate_tokens(model, list(prompts), max_new_tokens=tokens, eos=())

    linears = () if model.recipe is None else model.recipe.linears
    kinds: tuple[set[str], set[str]] = set(), set()
    for path, method, _ in linears:
        kinds[path in model.head_site.linears].add(_kind(method))
    blocks, head = (" and ".join(sorted(found)) for found in kinds)
    dtype = model.dtype.name + (", int8 inputs" if _rounds_inputs(model) else "")
    facts = {"model": label, "method": blocks or "float", "head": head or "float", "dtype": dtype}
    return Contestant(chunks, read_bytes(model), model.config.vocab_size, facts, model.config.max_position_embeddings)


def _rounds_inputs(model: Decoder) -> bool:
    return any(
        isinstance(part, QuantizeInput) for operator in quantized_leaves(model).values() for part in parts(operator)
    )


def with_rounded_inputs(label: str, model: Decoder) -> dict[str, Contestant]:
    """A model as it is, and beside it the model with inputs of 8 bits, by label.

    Raises:
      ValueError: its layers can't round their inputs, or do so already.
    """
    return {label: contestant(label, model), f"{label}, int8 inputs": contestant(label, quantize_inputs(model))}


def of_shape(shape: str, methods: Sequence[str], head: str) -> dict[str, Entry]:
    """Models of a shape with random weights, by method.

    Args:
      shape: a key of `shapes.CONFIGS`.
      methods: keys of `shapes.METHODS`.
      head: likewise, for the head of those whose linears have few bits. A tied head is the embedding too.
    """

    def entry(method: str) -> Entry:
        of = shape, shapes.METHODS[method], None if shapes.METHODS[method] is None else shapes.METHODS[head]
        return Entry(
            lambda: contestant(shape, shapes.random_model(*of)),
            shapes.model_bytes(*of),
            shapes.CONFIGS[shape].max_position_embeddings,
        )

    return {method: entry(method) for method in methods}


def groups(entries: Mapping[str, Entry], room: int | None) -> tuple[list[list[str]], list[str]]:
    """The names of contestants that are in memory together, in their order, and a note for each that doesn't fit.

    Args:
      entries: by name.
      room: bytes for weights; None if there is no known limit.
    """
    held: list[list[str]] = []
    notes, left = [], 0
    for name, entry in entries.items():
        if room is not None and entry.nbytes > room:
            notes.append(
                f"{name} is left out: its weights take {entry.nbytes / 1e9:.1f} GB, and there is room for "
                f"{room / 1e9:.1f}"
            )
            continue
        if not held or (room is not None and entry.nbytes > left):
            held.append([])
            left = 0 if room is None else room
        held[-1].append(name)
        left -= entry.nbytes
    if len(held) > 1:
        told = ", then ".join(" and ".join(group) for group in held)
        notes.append(f"not all fit in memory together, so turns were taken among {told}")
    return held, notes


def read_bytes(model: Decoder) -> int:
    """Bytes of weights that a token reads: all weights except embeddings that don't serve as the head, of which it
    reads one row."""
    looked_up = [
        node
        for path, node in nnx.iter_modules(model)
        if isinstance(node, nnx.Embed | Any4Embed) and ".".join(map(str, path)) not in model.head_site.linears
    ]
    return tree_bytes(nnx.state(model)) - sum(tree_bytes(nnx.state(embedding)) for embedding in looked_up)


def _kind(method: AnyMethod) -> str:
    """The method's name with its number of bits, such as "int8", and the dtype of learned tables if it isn't int8."""
    bits = getattr(method, "bits", None)
    name = method.name if bits is None else f"{method.name.rstrip('0123456789')}{bits}"
    tables = getattr(method, "stored_table_dtype", "int8")
    return name if tables == "int8" else f"{name}, {tables} tables"
