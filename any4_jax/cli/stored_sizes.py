"""What the quantized layers of a checkpoint take: next to 16-bit floats, and as a histogram of bits per weight."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

from any4_jax.cli.output import megabytes, table

FLOAT_BYTES = 2
"""Of a weight in bfloat16 or float16, in which models are published."""
BIN = 0.25
BAR = 40
# The path up to the number of the block.
_BLOCK = re.compile(r"^.*?\.\d+\.")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A quantized layer.

    Attributes:
      name: its path.
      method: what made it.
      shape: of its weights, [N, K] or of a stack.
      nbytes: of all that is stored for it.
      lora_bytes: of these, what a low-rank update takes.
    """

    name: str
    method: str
    shape: tuple[int, ...]
    nbytes: int
    lora_bytes: int

    @property
    def weights(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / self.weights


@dataclasses.dataclass(frozen=True)
class Size:
    """What the layers of one kind take.

    Attributes:
      kind: their path without the number of the block.
      layers: how many there are.
      weights: of them all.
      bytes: as they are stored.
      float_bytes: as 16-bit floats.
    """

    kind: str
    layers: int
    weights: int
    bytes: int
    float_bytes: int


def compared(layers: Iterable[Layer]) -> list[Size]:
    """The sizes of each kind of layer, in the order in which the kinds come."""
    found: dict[str, list[Size]] = {}
    for layer in layers:
        kind = _BLOCK.sub("", layer.name)
        size = Size(kind, 1, layer.weights, layer.nbytes, FLOAT_BYTES * layer.weights)
        found.setdefault(kind, []).append(size)
    return [_sum(kind, sizes) for kind, sizes in found.items()]


def size_table(layers: Sequence[Layer], rest: int) -> str:
    """A table of the sizes of each kind, of all quantized layers, and of the model with `rest` bytes of others."""
    kinds = compared(layers)
    every = _sum("all of these", kinds)
    rows = [_row(size) for size in (*kinds, every)]
    whole = every.bytes + rest, every.float_bytes + rest
    rows.append(["the other parameters", "", "", "", megabytes(rest), megabytes(rest), ""])
    rows.append(["the model", "", "", "", *map(megabytes, whole), _ratio(*whole)])
    return table(["kind of layer", "layers", "weights", "bits/weight", "MB", "MB at 16 bits", "times smaller"], rows)


def histogram(layers: Iterable[Layer]) -> str:
    """Bars: how many of the quantized weights take how many bits, a quarter of a bit to a bar."""
    found: dict[int, list[int]] = {}
    for layer in layers:
        found.setdefault(math.floor(layer.bits / BIN), []).append(layer.weights)
    total = sum(map(sum, found.values()))
    rows = []
    for number, weights in sorted(found.items()):
        share = sum(weights) / total
        span = f"{BIN * number:.2f} to {BIN * (number + 1):.2f}"
        rows.append([span, str(len(weights)), f"{share:.1%}", ("#" * max(1, round(BAR * share))).ljust(BAR)])
    return table(["bits per weight", "layers", "of the weights", " " * BAR], rows)


def _sum(kind: str, sizes: Iterable[Size]) -> Size:
    sizes = list(sizes)
    names = [field.name for field in dataclasses.fields(Size)]
    return Size(kind, *(sum(getattr(size, name) for size in sizes) for name in names[1:]))


def _row(size: Size) -> list[str]:
    bits = f"{8 * size.bytes / size.weights:.3f}"
    sizes = size.bytes, size.float_bytes
    return [size.kind, str(size.layers), f"{size.weights:,}", bits, *map(megabytes, sizes), _ratio(*sizes)]


def _ratio(stored: int, before: int) -> str:
    return f"{before / stored:.2f}"
