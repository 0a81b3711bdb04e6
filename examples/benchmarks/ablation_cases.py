"""The cases of ablations.py: each study varies one choice and leaves the others at their defaults."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from any4_jax.methods import FP4, NF4, Any4, Int

NONE, PROMPT = "none", "prompt"


@dataclasses.dataclass(frozen=True)
class Case:
    """A method and its calibration data.

    Attributes:
      name: of the row.
      method: any method.
      samples: pieces of the calibration text, spread evenly over it; 0 means the bundled prompt.
      length: tokens in a piece.
      calibrated: whether statistics are gathered at all.
    """

    name: str
    method: Any
    samples: int = 0
    length: int = 512
    calibrated: bool = True

    @property
    def calibration(self) -> str:
        if not self.calibrated:
            return NONE
        return f"text, {self.samples} x {self.length} tokens" if self.samples else PROMPT


def reference(g: int) -> Case:
    """The case that "recovered" is relative to."""
    return _fixed("nf4, float32 scales", NF4(group_size=g, scale_dtype="float32", table_dtype="float32"))


def paper(g: int) -> Case:
    """The case with which errors of learned tables are compared, row by row."""
    return Case("any4, paper's recipe", Any4.paper(group_size=g))


def _fixed(name: str, method: Any) -> Case:
    return Case(name, method, calibrated=False)


def _headline(g: int) -> list[Case]:
    return [
        paper(g),
        Case("any4", Any4(group_size=g)),
        Case("any4", Any4(group_size=g), samples=8),
        Case("any4, exact tables alone", Any4(group_size=g, refit=False)),
        _fixed("nf4", NF4(group_size=g)),
        _fixed(f"nf4, groups of {g // 2}", NF4(group_size=g // 2)),
        _fixed(f"nf4, groups of {g // 4}", NF4(group_size=g // 4)),
        _fixed("int4", Int(group_size=g)),
        _fixed("fp4", FP4(group_size=g)),
        _fixed("int4, float minimum", Int(group_size=g, zero_point="float")),
        _fixed("int3", Int(bits=3, group_size=g)),
        _fixed("int3, float minimum", Int(bits=3, group_size=g, zero_point="float")),
        Case("any3", Any4(bits=3, group_size=g)),
        Case("any3", Any4(bits=3, group_size=g), samples=8),
        Case("any2", Any4(bits=2, group_size=g)),
    ]


def _parts(g: int) -> list[Case]:
    plain = Any4(group_size=g, refit=False, scale_search=0)
    cases = [Case("exact tables alone", plain), Case("refit, no search", dataclasses.replace(plain, refit=True))]
    return cases + [
        Case(f"refit, {n} searches", dataclasses.replace(plain, refit=True, scale_search=n)) for n in (1, 2, 4)
    ]


def _group_size(g: int) -> list[Case]:
    cases = [Case(f"any4, groups of {size}", Any4(group_size=size)) for size in (32, 64, 128)]
    return [*cases, Case("any4, whole rows", Any4(group_size=1 << 30))]


def _calibration(g: int) -> list[Case]:
    sizes = ((8, 512), (32, 512), (128, 512), (8, 128), (2, 2048), (32, 2048))
    return [Case("any4", Any4(group_size=g))] + [Case("any4", Any4(group_size=g), s, t) for s, t in sizes]


def _term(g: int) -> list[Case]:
    """The terms that the exact solver may minimise, without the refit."""
    plain = Any4(group_size=g, refit=False)
    terms: tuple[tuple[str, dict[str, Any]], ...] = (
        ("w^2", dict(sample_weight=None, scale_weighting=0)),
        ("(s w)^2", dict(sample_weight=None, scale_weighting=2)),
        ("|mean x| w^2", dict(sample_weight="abs_mean", scale_weighting=0)),
        ("|mean x| s w^2", dict(sample_weight="abs_mean", scale_weighting=1)),
        ("mean|x| s w^2", dict(sample_weight="mean_abs", scale_weighting=1)),
        ("mean x^2 w^2", dict(sample_weight="second_moment", scale_weighting=0)),
        ("mean x^2 (s w)^2", dict(sample_weight="second_moment", scale_weighting=2)),
    )
    return [Case(f"minimise {name}", dataclasses.replace(plain, **fields)) for name, fields in terms]


def _initialisation(g: int) -> list[Case]:
    plain = Any4(group_size=g, refit=False)
    starts = ("kmeans++", "random", "int", "nf4")
    cases = [Case(f"Lloyd from {init}", dataclasses.replace(plain, solver="lloyd", init=init)) for init in starts]
    return [*cases, Case("exact", plain)]


def _gradient(g: int) -> list[Case]:
    """Tables trained on the layer's output, starting from exact tables and from those of the refit."""
    trained = Any4(group_size=g, solver="gradient")
    return [
        Case("gradient, no refit", dataclasses.replace(trained, refit=False)),
        Case("gradient", trained),
        Case("gradient", trained, samples=8),
        Case("gradient, 2048 tokens", dataclasses.replace(trained, sample_tokens=2048), samples=128),
    ]


def _bits(g: int) -> list[Case]:
    cases = [_fixed(f"int{bits}", Int(bits=bits, group_size=g)) for bits in (4, 3, 2)]
    return cases + [Case(f"any{bits}", Any4(bits=bits, group_size=g)) for bits in (4, 3, 2)]


STUDIES: Mapping[str, Callable[[int], list[Case]]] = {
    "headline": _headline,
    "parts": _parts,
    "group-size": _group_size,
    "calibration": _calibration,
    "term": _term,
    "initialisation": _initialisation,
    "gradient": _gradient,
    "bits": _bits,
}
"""Name of a study -> its cases, as a function of the group size."""
