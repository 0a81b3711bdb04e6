"""The cases of ablations.py: each study varies one choice and leaves the others at their defaults."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ablation_case import OTHER, PROMPT, WHOLE_ROWS, Case, fixed, on_text, paper
from ablation_inputs import awq, fpq, smoothquant
from ablation_spqr import spqr
from ablation_trained import tune

from any4_jax.methods import BCQ, FP4, GPTQ, NF4, Any4, Int, SmoothQuant


def _headline(g: int) -> list[Case]:
    return [
        paper(g),
        Case("any4", Any4(group_size=g)),
        on_text("any4", Any4(group_size=g), 8),
        Case("any4, exact tables alone", Any4(group_size=g, refit=False)),
        fixed("nf4", NF4(group_size=g)),
        fixed(f"nf4, groups of {g // 2}", NF4(group_size=g // 2)),
        fixed(f"nf4, groups of {g // 4}", NF4(group_size=g // 4)),
        fixed("int4", Int(group_size=g)),
        fixed("fp4", FP4(group_size=g)),
        fixed("int4, float minimum", Int(group_size=g, zero_point="float")),
        fixed("int3", Int(bits=3, group_size=g)),
        fixed("int3, float minimum", Int(bits=3, group_size=g, zero_point="float")),
        Case("any3", Any4(bits=3, group_size=g)),
        on_text("any3", Any4(bits=3, group_size=g), 8),
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
    rounded = SmoothQuant(inner=Any4(group_size=g, table_dtype="int8"), alpha=None, symmetric=True)
    inputs = [
        Case(f"any4, int8 tables, int8 inputs by {per}", dataclasses.replace(rounded, per=per))
        for per in ("group", "token")
    ]
    stored = [
        (name, f"{dtype} tables", dataclasses.replace(method, table_dtype=dtype))
        for name, method in (
            ("any4", Any4(group_size=g)),
            ("any3", Any4(bits=3, group_size=g)),
            ("any2", Any4(bits=2, group_size=g)),
            ("any4, exact tables alone", Any4(group_size=g, refit=False)),
        )
        for dtype in ("bfloat16", "int8")
    ]
    nearest = [Case(f"{name}, {tables}", method) for name, tables, method in stored]
    return (
        inputs
        + nearest
        + [on_text(f"GPTQ {name}, {tables}", GPTQ(inner=method)) for name, tables, method in stored if method.refit]
    )


def _group_size(g: int) -> list[Case]:
    cases = [Case(f"any4, groups of {size}", Any4(group_size=size)) for size in (32, 64, 128)]
    return [*cases, Case("any4, whole rows", Any4(group_size=WHOLE_ROWS))]


def _calibration(g: int) -> list[Case]:
    sizes = ((8, 512), (32, 512), (128, 512), (8, 128), (2, 2048), (32, 2048))
    return [Case("any4", Any4(group_size=g))] + [on_text("any4", Any4(group_size=g), s, t) for s, t in sizes]


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
        on_text("gradient", trained, 8),
        on_text("gradient, 2048 tokens", dataclasses.replace(trained, sample_tokens=2048)),
    ]


def _bits(g: int) -> list[Case]:
    cases = [fixed(f"int{bits}", Int(bits=bits, group_size=g)) for bits in (4, 3, 2)]
    return cases + [Case(f"any{bits}", Any4(bits=bits, group_size=g)) for bits in (4, 3, 2)]


def _bcq(g: int) -> list[Case]:
    """Sums of binary planes beside integers of as many bits, then what each choice in them is worth."""
    counted: dict[str, Any] = dict(sample_weight="second_moment")
    cases = [fixed(f"int{bits}", Int(bits=bits, group_size=g)) for bits in (4, 3, 2)]
    for bits in (4, 3, 2):
        plain = BCQ(bits=bits, group_size=g)
        cases += [
            fixed(f"BCQ {bits}", plain),
            fixed(f"BCQ {bits}, offsets", dataclasses.replace(plain, offset=True)),
            Case(f"BCQ {bits}, weighted", dataclasses.replace(plain, **counted)),
            Case(f"BCQ {bits}, weighted, offsets", dataclasses.replace(plain, offset=True, **counted)),
        ]
    rows = [fixed(f"BCQ {bits}, whole rows", BCQ(bits=bits, group_size=WHOLE_ROWS)) for bits in (4, 3)]
    return [*cases, fixed("BCQ 4, greedy", BCQ(group_size=g, rounds=0)), *rows]


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
        on_text("any4", any4),
        on_text("GPTQ any4", best),
        on_text("GPTQ int4", GPTQ(inner=clipped)),
        on_text("GPTQ int4, no clip", GPTQ(inner=dataclasses.replace(clipped, clip=False))),
        on_text("GPTQ nf4", GPTQ(inner=NF4(group_size=g))),
        *(on_text(f"GPTQ any4, {name}", dataclasses.replace(best, **fields)) for name, fields in choices),
        *(on_text(f"GPTQ any{bits}", GPTQ(inner=Any4(bits=bits, group_size=g))) for bits in (3, 2)),
        *(
            on_text(f"GPTQ any{bits}, {n} refits", GPTQ(inner=Any4(bits=bits, group_size=g), refits=n))
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
        *(on_text("GPTQ any4", method, s, t) for s, t in sizes),
        Case("GPTQ any4, damping 0.01", published),
        *(on_text("GPTQ any4, damping 0.01", published, s) for s in (8, 32, 128)),
    ]


def _bits_kl(g: int) -> list[Case]:
    """From 2 to 5 bits per weight: all tables and group sizes, plain and with GPTQ's codes; see quality_plot.py."""
    sizes = {f"groups of {size}": size for size in (32, 64, 128)} | {"whole rows": WHOLE_ROWS}
    cases = [
        fixed(f"{name}, {groups}", dataclasses.replace(method, group_size=size))
        for name, method in (*((f"int{bits}", Int(bits=bits)) for bits in (2, 3, 4)), ("nf4", NF4()))
        for groups, size in sizes.items()
    ]
    cases += [
        on_text(f"any{bits}, {groups}", Any4(bits=bits, group_size=size))
        for bits in (2, 3, 4)
        for groups, size in sizes.items()
    ]
    inner = (
        *((f"int{bits}", Int(bits=bits, clip=True)) for bits in (2, 3, 4)),
        ("nf4", NF4()),
        *((f"any{bits}", Any4(bits=bits)) for bits in (2, 3, 4)),
    )
    return cases + [
        on_text(f"GPTQ {name}, {groups}", GPTQ(inner=dataclasses.replace(method, group_size=size)))
        for name, method in inner
        for groups, size in sizes.items()
    ]


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
    "bcq": _bcq,
    "gptq": _gptq,
    "gptq-tokens": _gptq_tokens,
    "awq": awq,
    "bits-kl": _bits_kl,
    "smoothquant": smoothquant,
    "fpq": fpq,
    "tune": tune,
    "spqr": spqr,
}
"""Name of a study -> its cases, as a function of the group size."""
