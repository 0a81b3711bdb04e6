"""The cases of ablations.py: each study varies one choice and leaves the others at their defaults."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from any4_jax.methods import FP4, GPTQ, NF4, Any4, Int, SmoothQuant
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
    """

    name: str
    method: Any
    source: str = PROMPT
    samples: int = 0
    length: int = 512

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
        calibrates, or its statistics of all layers at once are too large."""
        method = self.method
        wider = scope_of(method) != "matrix"
        return wider or (self.calibrated and (method.sequential or Hessian() in method.needs))


def reference(g: int) -> Case:
    """The case that "recovered" is relative to."""
    return _fixed("nf4, float32 scales", NF4(group_size=g, scale_dtype="float32", table_dtype="float32"))


def paper(g: int) -> Case:
    """The case with which errors of learned tables are compared, row by row."""
    return Case("any4, paper's recipe", Any4.paper(group_size=g))


def _fixed(name: str, method: Any) -> Case:
    return Case(name, method, NONE)


def _on_text(name: str, method: Any, samples: int = 128, length: int = 512) -> Case:
    return Case(name, method, TEXT, samples, length)


def _headline(g: int) -> list[Case]:
    return [
        paper(g),
        Case("any4", Any4(group_size=g)),
        _on_text("any4", Any4(group_size=g), 8),
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
        _on_text("any3", Any4(bits=3, group_size=g), 8),
        Case("any2", Any4(bits=2, group_size=g)),
    ]


def _parts(g: int) -> list[Case]:
    plain = Any4(group_size=g, refit=False, scale_search=0)
    cases = [Case("exact tables alone", plain), Case("refit, no search", dataclasses.replace(plain, refit=True))]
    return cases + [
        Case(f"refit, {n} searches", dataclasses.replace(plain, refit=True, scale_search=n)) for n in (1, 2, 4)
    ]


def _tables(g: int) -> list[Case]:
    """Learned tables of bfloat16 and of int8, refitted as they are stored and not refitted at all; then those of int8
    with inputs of 8 bits."""
    rounded = SmoothQuant(inner=Any4(group_size=g, table_dtype="int8"), alpha=None)
    inputs = [
        Case(f"any4, int8 tables, int8 inputs by {per}", dataclasses.replace(rounded, per=per))
        for per in ("group", "token")
    ]
    return inputs + [
        Case(f"{name}, {dtype} tables", dataclasses.replace(method, table_dtype=dtype))
        for name, method in (
            ("any4", Any4(group_size=g)),
            ("any3", Any4(bits=3, group_size=g)),
            ("any2", Any4(bits=2, group_size=g)),
            ("any4, exact tables alone", Any4(group_size=g, refit=False)),
        )
        for dtype in ("bfloat16", "int8")
    ]


def _group_size(g: int) -> list[Case]:
    cases = [Case(f"any4, groups of {size}", Any4(group_size=size)) for size in (32, 64, 128)]
    return [*cases, Case("any4, whole rows", Any4(group_size=WHOLE_ROWS))]


def _calibration(g: int) -> list[Case]:
    sizes = ((8, 512), (32, 512), (128, 512), (8, 128), (2, 2048), (32, 2048))
    return [Case("any4", Any4(group_size=g))] + [_on_text("any4", Any4(group_size=g), s, t) for s, t in sizes]


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
        _on_text("gradient", trained, 8),
        _on_text("gradient, 2048 tokens", dataclasses.replace(trained, sample_tokens=2048)),
    ]


def _bits(g: int) -> list[Case]:
    cases = [_fixed(f"int{bits}", Int(bits=bits, group_size=g)) for bits in (4, 3, 2)]
    return cases + [Case(f"any{bits}", Any4(bits=bits, group_size=g)) for bits in (4, 3, 2)]


def _gptq(g: int) -> list[Case]:
    """What each choice in GPTQ is worth on one text; then texts of another domain, beside `Any4()` on the same ones."""
    any4, clipped = Any4(group_size=g), Int(group_size=g, clip=True)
    best = GPTQ(inner=any4)
    choices: tuple[tuple[str, dict[str, Any]], ...] = (
        *((f"asymmetric {alpha:g}", dict(asymmetric=alpha)) for alpha in (0.0, 0.25, 0.75, 1.0)),
        ("columns in their order", dict(act_order=False)),
        *((f"damping {damping:g}", dict(damping=damping)) for damping in (0.001, 0.01, 0.03, 0.1)),
        ("inputs of the float model", dict(sequential=False, asymmetric=0.0)),
    )
    return [
        _on_text("any4", any4),
        _on_text("GPTQ any4", best),
        _on_text("GPTQ int4", GPTQ(inner=clipped)),
        _on_text("GPTQ int4, no clip", GPTQ(inner=dataclasses.replace(clipped, clip=False))),
        _on_text("GPTQ nf4", GPTQ(inner=NF4(group_size=g))),
        *(_on_text(f"GPTQ any4, {name}", dataclasses.replace(best, **fields)) for name, fields in choices),
        *(_on_text(f"GPTQ any{bits}", GPTQ(inner=Any4(bits=bits, group_size=g))) for bits in (3, 2)),
        *(
            _on_text(f"GPTQ any{bits}, {n} refits", GPTQ(inner=Any4(bits=bits, group_size=g), refits=n))
            for bits, n in ((3, 4), (2, 4), (4, 4))
        ),
        *(
            Case(name, method, source)
            for source in (OTHER, PROMPT)
            for name, method in (("any4", any4), ("GPTQ any4", best))
        ),
    ]


def _gptq_tokens(g: int) -> list[Case]:
    sizes = ((2, 512), (8, 512), (32, 512), (128, 512), (32, 2048), (128, 2048))
    method = GPTQ(inner=Any4(group_size=g))
    published = dataclasses.replace(method, damping=0.01)
    return [
        Case("GPTQ any4", method),
        *(_on_text("GPTQ any4", method, s, t) for s, t in sizes),
        Case("GPTQ any4, damping 0.01", published),
        *(_on_text("GPTQ any4, damping 0.01", published, s) for s in (8, 32, 128)),
    ]


def _bits_kl(g: int) -> list[Case]:
    """From 2 to 5 bits per weight: all tables and group sizes, plain and with GPTQ's codes; see quality_plot.py."""
    sizes = {f"groups of {size}": size for size in (32, 64, 128)} | {"whole rows": WHOLE_ROWS}
    cases = [
        _fixed(f"{name}, {groups}", dataclasses.replace(method, group_size=size))
        for name, method in (*((f"int{bits}", Int(bits=bits)) for bits in (2, 3, 4)), ("nf4", NF4()))
        for groups, size in sizes.items()
    ]
    cases += [
        _on_text(f"any{bits}, {groups}", Any4(bits=bits, group_size=size))
        for bits in (2, 3, 4)
        for groups, size in sizes.items()
    ]
    inner = (
        *((f"int{bits}", Int(bits=bits, clip=True)) for bits in (2, 3, 4)),
        ("nf4", NF4()),
        *((f"any{bits}", Any4(bits=bits)) for bits in (2, 3, 4)),
    )
    return cases + [
        _on_text(f"GPTQ {name}, {groups}", GPTQ(inner=dataclasses.replace(method, group_size=size)))
        for name, method in inner
        for groups, size in sizes.items()
    ]


def _smoothquant(g: int) -> list[Case]:
    """Weights and inputs of few bits, smoothed and not: rows of integers, then tables in groups."""
    w8, w6 = (SmoothQuant(inner=Int(bits=b, symmetric=True, group_size=WHOLE_ROWS), input_bits=b) for b in (8, 6))
    w4 = SmoothQuant(inner=Any4(group_size=g))
    cases = [_fixed(f"{name}, not smoothed", dataclasses.replace(w, alpha=None)) for name, w in _named(w8, w6, w4)]
    cases += [
        _on_text(f"{name}, alpha {alpha}", dataclasses.replace(w, alpha=alpha))
        for name, w in _named(w8, w6, w4)
        for alpha in (0.5, 0.55, 0.75)
    ]
    cases += [_on_text(f"{name}, alpha searched", dataclasses.replace(w, search=21)) for name, w in _named(w8, w6)]
    return cases + [
        _on_text("W8A8, alpha 0.5, inputs with a zero point", dataclasses.replace(w8, symmetric=False)),
        _on_text("W8A8, static, not smoothed", dataclasses.replace(w8, alpha=None, per="tensor")),
        *(_on_text(f"W8A8, static, alpha {a}", dataclasses.replace(w8, alpha=a, per="tensor")) for a in (0.5, 0.75)),
    ]


def _named(*methods: SmoothQuant) -> list[tuple[str, SmoothQuant]]:
    return [(f"W{getattr(w.inner, 'bits', 4)}A{w.input_bits}", w) for w in methods]


STUDIES: Mapping[str, Callable[[int], list[Case]]] = {
    "headline": _headline,
    "parts": _parts,
    "tables": _tables,
    "group-size": _group_size,
    "calibration": _calibration,
    "term": _term,
    "initialisation": _initialisation,
    "gradient": _gradient,
    "bits": _bits,
    "gptq": _gptq,
    "gptq-tokens": _gptq_tokens,
    "bits-kl": _bits_kl,
    "smoothquant": _smoothquant,
}
"""Name of a study -> its cases, as a function of the group size."""
