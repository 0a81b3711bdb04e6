"""What a quantization method is: three scopes, one record of results.

A method is a frozen dataclass that serves as configuration, as flags of the command line and as entry of the manifest.
Its fields are numbers, strings, booleans, None, tuples of these, or methods (`GPTQ(inner=Any4())`). Every field has a
default. Its scope is what it has to see at once: one matrix, the matrices that read one input, or a whole block.
`lifts.py` lifts the first two to a block. Manifests and the command line know a method of your own once it is in the
catalogue: `a4.methods.CATALOGUE[Mine.name] = Mine`.

The statistics that a method can ask for are in `any4_jax.statistics`: `Moments()` (mean, mean_abs, second_moment),
`AbsMax()`, `Hessian()` (mean), `Sample(tokens)` (x). `gathered[Moments()].second_moment` is E[x^2]. The matrix that a
result stands for is `any4_jax.dequantize(result.operator)`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp

from any4_jax.pytree import register_dataclass
from any4_jax.statistics import Gathered, Statistic

Scope = Literal["matrix", "site", "block"]
Note = Any
"""A note on a result: a string, a bool, a number, an array of numbers, or a tuple of these. Numbers may be traced, as
`apply` runs under jit: there is no `float(x)` of them, and none in a tuple with strings."""

SCALED = "input_scale"
"""The name of the note that a walk adds where a method scales the input of a site: what holds the scale."""

Order = Literal["at_once", "by_site"]
"""When the statistics of a block's sites are gathered: all before any linear of the block is quantized, or those of a
site after the sites before it are quantized."""


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a method for one matrix.

    Attributes:
      operator: an operator of shape [N, K].
      notes: what the method found, for the manifest. Strings and bools are static; numbers may be traced scalars.
      faults: why there is no usable result, which `apply` can't raise where it depends on traced values: by the
        sentence, with {} for each number in it, whether it is so (bool []) and the numbers. The first that is so is
        raised as a ValueError; none are kept.
    """

    operator: Any
    notes: Mapping[str, Note] = dataclasses.field(default_factory=dict)
    faults: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    def tree_flatten(self) -> tuple[Any, Any]:
        found = {name: note for name, note in self.notes.items() if not _is_static_note(note)}
        said = tuple((name, note) for name, note in self.notes.items() if _is_static_note(note))
        return (self.operator, found, dict(self.faults)), said

    @classmethod
    def tree_unflatten(cls, said: Any, children: Any) -> "Result":
        operator, found, faults = children
        return cls(operator, dict(said) | found, faults)


def _is_static_note(note: Note) -> bool:
    """Whether a note is of words, which no traced value is."""
    if isinstance(note, tuple):
        return bool(note) and all(map(_is_static_note, note))
    return isinstance(note, str | bool)


class AnyMethod(Protocol):
    """What methods of all scopes have in common."""

    name: ClassVar[str]

    @property
    def sequential(self) -> bool:
        """Whether its statistics come from the model as quantized so far, or from the float model."""
        ...

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The statistics that it uses where there is calibration data."""
        ...

    def check(self, gathered: bool) -> None:
        """Raises ValueError if its fields contradict each other, or need statistics and none are `gathered`."""
        ...


@runtime_checkable
class Method(AnyMethod, Protocol):
    """A method that looks at one matrix and the statistics of its input."""

    def apply(self, w: jax.Array, gathered: Gathered | None) -> Result:
        """The operator for w float32 [N, K]. Pure, traced under jit with the method static."""
        ...


@register_dataclass
@dataclasses.dataclass(frozen=True)
class SiteWeights:
    """The matrices that read one input.

    Attributes:
      weights: float32 [N, K] by the path of its linear in the block; N differs, K is the same.
      repeat, width: the input channels are those of the module before the site, in runs of `width`, each run `repeat`
        times; see `any4_jax.models.Site` (static).
      foldable: whether a factor for each input channel can be folded into the module before the site (static).
    """

    weights: Mapping[str, jax.Array]
    repeat: int = dataclasses.field(default=1, metadata={"static": True})
    width: int = dataclasses.field(default=1, metadata={"static": True})
    foldable: bool = dataclasses.field(default=True, metadata={"static": True})

    def shared(self, factor: jax.Array) -> jax.Array:
        """A factor [K] with its mean over the repeats of each channel in their places: what can be folded.

        A factor that differs among the repeats is kept in a `ScaleInput`.
        """
        runs = factor.reshape(-1, self.repeat, self.width)
        return jnp.broadcast_to(runs.mean(axis=1, keepdims=True), runs.shape).reshape(-1)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class SiteResult:
    """The result of a site method for a site.

    With a factor s for each input channel, the method quantizes W * s, and the input is multiplied by 1 / s:

        SiteResult({path: inner.apply(w * s, gathered.scaled(1 / s)) ...}, input_scale=1 / s)

    Attributes:
      results: for every path of the `SiteWeights`. The operators stand for the matrices that multiply the scaled input.
      input_scale: float32 [K], what the input channels are multiplied by before the operators: positive and finite;
        None for none. It is folded into the norm or linear before the site, or kept in a `ScaleInput` where that is
        impossible.
    """

    results: Mapping[str, Result]
    input_scale: jax.Array | None = None


@runtime_checkable
class SiteMethod(AnyMethod, Protocol):
    """A method that looks at all matrices of a site, and may scale its input (AWQ, SmoothQuant).

    A sequential one may have an attribute `order`, an `Order`; without it that is "by_site". With "at_once" the
    statistics are of the model with the blocks before quantized, and the site's own block still float, so that what
    its inputs are multiplied by can be folded into linears of the block.
    """

    scope: ClassVar[Literal["site"]]

    def apply(self, site: SiteWeights, gathered: Gathered | None) -> SiteResult:
        """The operators for a site. Pure, traced under jit with the method static.

        `gathered` holds the statistics of the site's input.
        """
        ...


class Block(Protocol):
    """One block of a decoder as a method sees it: arrays by name, and functions of them.

    Attributes:
      contents: arrays and operators by dotted name in the block. The matrix of a linear at `path` is "path.kernel", a
        float [K, N] until it becomes an operator [N, K].
      assigned: the method of each linear to quantize, by path.
      sites: the block's `any4_jax.models.Site`s, in the order in which they run.
      inputs: what enters the block, [B, T, E] for each batch: the outputs of the block before, of the quantized one
        where the method is sequential. Empty where there is no data.
      masks: bool [B, T] for each batch, False on padding.
      last: whether it is the model's last block.
    """

    contents: Mapping[str, Any]
    assigned: Mapping[str, AnyMethod]
    sites: tuple[Any, ...]
    inputs: list[jax.Array]
    masks: list[Any]
    last: bool

    def program(self, batch: int, length: int) -> Callable[[Mapping[str, Any], jax.Array], jax.Array]:
        """`run` for inputs [batch, length, E], as a function that can be a static argument of jit: those of blocks of
        one structure are equal, so that what is compiled with it serves all of them."""
        ...

    def run(self, contents: Mapping[str, Any], x: jax.Array) -> jax.Array:
        """The output [B, T, E] of the block with these contents for an input [B, T, E].

        Pure: it may be traced and differentiated.
        """
        ...

    def targets(self) -> list[jax.Array]:
        """The outputs of the float block for the float model's activations, [B, T, E] for each batch."""
        ...

    def gather(self, contents: Mapping[str, Any], needs: Mapping[str, tuple[Statistic, ...]]) -> dict[str, Gathered]:
        """Runs the block with these contents and gathers statistics by site.

        Where no method of the model is sequential, they are of the float block, whatever the contents.

        Args:
          contents: as the attribute.
          needs: by the name of a site, the statistics to gather.
        """
        ...

    def reassigned(self, method: AnyMethod) -> "Block":
        """The block with every assigned linear assigned to `method`."""
        ...

    def quantize(
        self, contents: Mapping[str, Any], paths: list[str], gathered: Mapping[str, Gathered]
    ) -> "BlockResult":
        """The contents with some of the `assigned` linears quantized, each by its own method, and the notes.

        Args:
          contents: as the attribute.
          paths: the linears to quantize.
          gathered: statistics by the name of a site.
        """
        ...


@dataclasses.dataclass(frozen=True)
class BlockResult:
    """New contents of a block, and the notes on each linear by its path in the block."""

    contents: Mapping[str, Any]
    notes: Mapping[str, Mapping[str, Note]]


@runtime_checkable
class BlockMethod(AnyMethod, Protocol):
    """A method that sees a block as a whole: it may run the block, and train it against its float outputs.

    Attributes:
      targets: whether it calls `Block.targets`, for which the float model runs beside the quantized one.
    """

    scope: ClassVar[Literal["block"]]
    targets: ClassVar[bool]

    def apply(self, block: Block) -> BlockResult:
        """The block quantized. The linears of `assigned` that it leaves float stay float."""
        ...


def scope_of(method: AnyMethod) -> Scope:
    """What a method has to see at once.

    Raises:
      ValueError: its `scope` is none of the three.
    """
    scope: Any = getattr(method, "scope", "matrix")
    if scope not in get_args(Scope):
        raise ValueError(f"got {method.name} of scope {scope!r}, need one of {get_args(Scope)}; correct the method")
    return scope
