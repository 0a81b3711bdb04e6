"""A case of ablations.py: a method and the data that it sees."""

import dataclasses
from typing import Any

from any4_jax.methods import FPQ, NF4, Any4
from any4_jax.methods.base import scope_of
from any4_jax.statistics import Hessian

NONE, PROMPT, TEXT, OTHER = "none", "prompt", "text", "essays and stories"
WHOLE_ROWS = 1 << 30


@dataclasses.dataclass(frozen=True)
class Case:
    """A method and its calibration data.

    Attributes:
      name: of the row; what stands before ", groups of N" or ", whole rows" names a line of quality_plot.py.
      method: any method.
      source: NONE, the bundled PROMPT, a calibration TEXT, or OTHER: bundled texts from another domain than the one
        that is measured.
      samples: pieces of the calibration TEXT, spread evenly over it.
      length: tokens in a piece.
      rules: of linears that take other methods, see `quantize_model`.
      tuned: the arguments of `any4_jax.tune`, which follows on the same data; None for no training end to end.
    """

    name: str
    method: Any
    source: str = PROMPT
    samples: int = 0
    length: int = 512
    rules: tuple[tuple[str, Any], ...] = ()
    tuned: tuple[tuple[str, Any], ...] | None = None

    @property
    def quantized(self) -> str:
        """The method, as rows have it, with the rules."""
        return repr(self.method) + "".join(f", {pattern}: {method!r}" for pattern, method in self.rules)

    @property
    def described(self) -> str:
        """The method with the rules, and what is trained end to end afterwards."""
        if self.tuned is None:
            return self.quantized
        return f"{self.quantized}, tune({', '.join(f'{name}={value!r}' for name, value in self.tuned)})"

    @property
    def calibrated(self) -> bool:
        """Whether statistics are gathered at all."""
        return self.source != NONE

    @property
    def calibration(self) -> str:
        """The data, as rows name it."""
        return f"{TEXT}, {self.samples} x {self.length} tokens" if self.source == TEXT else self.source

    @property
    def walked(self) -> bool:
        """Whether the method has to walk over the model: it sees more than one matrix, it quantizes while it
        calibrates, its statistics of all layers at once are too large, its search is one for a GPU, or training
        follows."""
        method = self.method
        wider = scope_of(method) != "matrix" or isinstance(method, FPQ)
        return wider or self.tuned is not None or (self.calibrated and (method.sequential or Hessian() in method.needs))


def reference(g: int) -> Case:
    """The case that "recovered" is relative to."""
    return fixed("nf4, float32 scales", NF4(group_size=g, scale_dtype="float32", table_dtype="float32"))


def paper(g: int) -> Case:
    """The case with which errors of learned tables are compared, row by row."""
    return Case("any4, paper's recipe", Any4.paper(group_size=g))


def fixed(name: str, method: Any) -> Case:
    """A case without data."""
    return Case(name, method, NONE)


def on_text(name: str, method: Any, samples: int = 128, length: int = 512) -> Case:
    """A case that calibrates on pieces of the text."""
    return Case(name, method, TEXT, samples, length)


def end_to_end(case: Case, **settings: Any) -> Case:
    """A case, trained end to end after that."""
    return dataclasses.replace(case, name=f"{case.name}, then end to end", tuned=tuple(settings.items()))
