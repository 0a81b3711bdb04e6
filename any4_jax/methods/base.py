"""What a quantization method is: three scopes, one record of results.

A method is a frozen dataclass, which is at once its configuration, the command line's flags and the manifest's entry:
its fields are numbers, strings, booleans, None, or methods (`GPTQ(inner=Any4())`). Its scope is what it has to see at
once: one matrix, the matrices that read one input, or a whole block. `lifts.py` lifts the first two to a block.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import jax

from any4_jax.statistics import Gathered, Statistic

Scope = Literal["matrix", "site", "block"]
Note = Any
"""Of a result: a number, a string, a bool, or a tuple of numbers, of strings and bools, or of such tuples."""


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Result:
    """What a method makes of one matrix.

    Attributes:
      operator: of shape [N, K].
      notes: what it found, for the manifest: strings and bools are static, numbers may be traced scalars.
    """

    operator: Any
    notes: Mapping[str, Note] = dataclasses.field(default_factory=dict)

    def tree_flatten(self) -> tuple[Any, Any]:
        found = {name: note for name, note in self.notes.items() if not _is_said(note)}
        said = tuple((name, note) for name, note in self.notes.items() if _is_said(note))
        return (self.operator, found), said

    @classmethod
    def tree_unflatten(cls, said: Any, children: Any) -> "Result":
        operator, found = children
        return cls(operator, dict(said) | found)


def _is_said(note: Note) -> bool:
    """Whether a note is of words, which no traced value is."""
    if isinstance(note, tuple):
        return bool(note) and all(map(_is_said, note))
    return isinstance(note, str | bool)


class AnyMethod(Protocol):
    """What methods of all scopes have."""

    name: ClassVar[str]

    @property
    def sequential(self) -> bool:
        """Whether its statistics come from the model as quantized so far; else all come from the float model."""
        ...

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The statistics that it uses where there are activations."""
        ...

    def check(self, gathered: bool) -> None:
        """Raises ValueError where its fields contradict each other, or need statistics and there are none."""
        ...


@runtime_checkable
class Method(AnyMethod, Protocol):
    """A method that looks at one matrix and its input's statistics."""

    def apply(self, w: jax.Array, gathered: Gathered | None) -> Result:
        """The operator for w float32 [N, K]. Pure, traced under jit with the method static."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SiteWeights:
    """The matrices that read one input.

    Attributes:
      weights: float32 [N, K] by the path of its linear in the block; N differs, K is the same.
      repeat, width: see `any4_jax.models.Site`: input channels that come from one channel of what precedes the site
        come in runs of `width`, each `repeat` times (static).
      foldable: whether a factor for each input channel can be folded into what precedes the site (static).
    """

    weights: Mapping[str, jax.Array]
    repeat: int = dataclasses.field(default=1, metadata={"static": True})
    width: int = dataclasses.field(default=1, metadata={"static": True})
    foldable: bool = dataclasses.field(default=True, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SiteResult:
    """What a site method makes of a site.

    Attributes:
      results: by the paths of the `SiteWeights`. The operators stand for the matrices that multiply the scaled input.
      input_scale: float32 [K], by which each input channel is to be multiplied before the operators; None for none.
        It is folded into the norm or linear before the site, or kept as a `ScaleInput` where that can't be.
    """

    results: Mapping[str, Result]
    input_scale: jax.Array | None = None


@runtime_checkable
class SiteMethod(AnyMethod, Protocol):
    """A method that looks at all matrices of a site, and may scale its input (AWQ, SmoothQuant)."""

    scope: ClassVar[Literal["site"]]

    def apply(self, site: SiteWeights, gathered: Gathered | None) -> SiteResult:
        """Pure, traced under jit with the method static. `gathered` are the statistics of the site's input."""
        ...


class Block(Protocol):
    """One block of a decoder as a method sees it: arrays by name, and functions of them.

    Attributes:
      contents: arrays and operators by dotted name in the block; the matrix of a linear at `path` is at
        "path.kernel", float [K, N] until it is an operator [N, K].
      assigned: the linears that the method is to quantize, by path, each with its method.
      sites: the block's `any4_jax.models.Site`s, in the order in which they run.
      inputs: what enters the block, [B, T, E] a batch: outputs of the blocks before, as quantized where the method is
        sequential. Empty where there is no data.
      masks: bool [B, T] a batch, False on padding.
    """

    contents: Mapping[str, Any]
    assigned: Mapping[str, AnyMethod]
    sites: tuple[Any, ...]
    inputs: list[jax.Array]
    masks: list[Any]

    def run(self, contents: Mapping[str, Any], x: jax.Array) -> jax.Array:
        """The block's output for one input under other contents. Pure: it may be traced and differentiated."""
        ...

    def targets(self) -> list[jax.Array]:
        """The outputs of the float block on the float model's own activations, a batch each."""
        ...

    def gather(self, contents: Mapping[str, Any], needs: Mapping[str, tuple[Statistic, ...]]) -> dict[str, Gathered]:
        """Statistics by site, of the sites and kinds that are named, with the block run under these contents."""
        ...

    def reassigned(self, method: AnyMethod) -> "Block":
        """The block with every assigned linear assigned to `method`."""
        ...

    def quantize(
        self, contents: Mapping[str, Any], paths: list[str], gathered: Mapping[str, Gathered]
    ) -> "BlockResult":
        """The contents with some of the `assigned` linears quantized, each by its own method, and the notes."""
        ...


@dataclasses.dataclass(frozen=True)
class BlockResult:
    """New contents of a block, and notes by the path of a linear in it."""

    contents: Mapping[str, Any]
    notes: Mapping[str, Mapping[str, Note]]


@runtime_checkable
class BlockMethod(AnyMethod, Protocol):
    """A method that sees a block as a whole: it may run it, and train it against its float outputs.

    Attributes:
      targets: whether it asks for `Block.targets`, for which the float model is run beside the quantized one.
    """

    scope: ClassVar[Literal["block"]]
    targets: ClassVar[bool]

    def apply(self, block: Block) -> BlockResult:
        """The block quantized. What it leaves float in `assigned` stays so."""
        ...


def scope_of(method: AnyMethod) -> Scope:
    """What a method has to see at once."""
    return getattr(method, "scope", "matrix")
