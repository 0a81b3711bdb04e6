"""The studies of ablations.py of methods that scale or round inputs."""

import dataclasses
from typing import Any

from ablation_case import OTHER, TEXT, WHOLE_ROWS, Case, fixed, on_text

from any4_jax.methods import AWQ, FPQ, GPTQ, NF4, Any4, Int, SmoothQuant


def awq(g: int) -> list[Case]:
    """Scales and clipping around each method, beside the method itself; then what each choice is worth, and another
    domain."""
    int4, nf4, any4 = Int(group_size=g), NF4(group_size=g), Any4(group_size=g)
    clipped = dataclasses.replace(int4, clip=True)
    choices: tuple[tuple[str, dict[str, Any]], ...] = (
        ("scales alone", dict(clips=0)),
        ("clipping alone", dict(ratios=1)),
        ("a factor for each query head", dict(shared=False)),
        ("by site", dict(order="by_site")),
        ("inputs of the float model", dict(sequential=False)),
    )
    return [
        fixed("int4", int4),
        fixed("nf4", nf4),
        on_text("int4, clipped", clipped),
        on_text("any4", any4),
        on_text("GPTQ int4", GPTQ(inner=clipped)),
        *(on_text(f"AWQ {name}", AWQ(inner=one)) for name, one in (("int4", int4), ("nf4", nf4), ("any4", any4))),
        *(on_text(f"AWQ int4, {name}", AWQ(inner=int4, **fields)) for name, fields in choices),
        on_text("AWQ int4, scales and GPTQ's clipping", AWQ(inner=clipped, search=int4, clips=0)),
        on_text("AWQ GPTQ int4, scales alone", AWQ(inner=GPTQ(inner=clipped), search=int4, clips=0)),
        on_text("AWQ any4, scales alone", AWQ(inner=any4, clips=0)),
        on_text("AWQ any4, scales searched for int4", AWQ(inner=any4, search=int4, clips=0)),
        Case("int4, clipped", clipped, OTHER),
        Case("any4", any4, OTHER),
        Case("GPTQ int4", GPTQ(inner=clipped), OTHER),
        Case("AWQ int4", AWQ(inner=int4), OTHER),
        Case("AWQ any4, scales alone", AWQ(inner=any4, clips=0), OTHER),
    ]


def smoothquant(g: int) -> list[Case]:
    """Weights and inputs of few bits, smoothed and not: rows of integers, then tables in groups."""
    published = SmoothQuant(alpha=0.5, size="max")
    w8, w6 = (
        dataclasses.replace(published, inner=Int(bits=b, symmetric=True, group_size=WHOLE_ROWS), input_bits=b)
        for b in (8, 6)
    )
    w4 = dataclasses.replace(published, inner=Any4(group_size=g))
    static = dataclasses.replace(w8, per="tensor", symmetric=True)
    plain = [dataclasses.replace(w, alpha=None, symmetric=s) for w in (w8, w6) for s in (False, True)]
    cases = [fixed(_smoothed(w), w) for w in (*plain, dataclasses.replace(w4, alpha=None))]
    tried: list[tuple[SmoothQuant, dict[str, Any]]] = [
        *((w, dict(alpha=alpha)) for w in (w8, w6) for alpha in (0.5, 0.55, 0.75)),
        *((w, dict(alpha=alpha, size="rms")) for w in (w8, w6) for alpha in (0.4, 0.5)),
        *((w, dict(search=21)) for w in (w8, w6)),
        *((w8, dict(symmetric=True, **more)) for more in ({}, dict(search=21))),
        *((w4, more) for more in ({}, dict(alpha=0.4, size="rms"))),
        *((static, more) for more in (dict(alpha=None), {}, dict(alpha=0.75), dict(search=21))),
    ]
    methods = [dataclasses.replace(method, **fields) for method, fields in tried]
    return [*cases, *(on_text(_smoothed(method), method) for method in methods)]


def _smoothed(method: SmoothQuant) -> str:
    """The name of a case: widths, then what differs from the defaults."""
    words = [f"W{getattr(method.inner, 'bits', 4)}A{method.input_bits}"]
    words += ["static"] * (method.per == "tensor") + ["symmetric"] * (method.symmetric and method.per == "token")
    if method.alpha is None:
        return ", ".join([*words, "not smoothed"])
    searched = f"{method.search} alphas searched"
    return ", ".join([*words, searched if method.search else f"alpha {method.alpha} of {method.size}"])


def fpq(g: int) -> list[Case]:
    """Floats of 4 bits for weights and inputs, then what each choice is worth; groups are rows."""
    best, plain = FPQ(), FPQ(shifts="none")
    kept = FPQ(shifts="kept")
    cases = (
        ("FPQ W4A4", best),
        ("FPQ baseline W4A4, no shifts", plain),
        ("MinMax FP W4A4", dataclasses.replace(plain, rounds=0, exponent_bits=2)),
        ("INT W4A4", dataclasses.replace(plain, rounds=0, exponent_bits=1)),
        ("FPQ W4A8", dataclasses.replace(best, input_bits=8)),
        ("FPQ W4A4, shifts kept", kept),
        ("FPQ W4A4, sequential", dataclasses.replace(best, sequential=True)),
        ("FPQ W4A4, 1024 tokens", dataclasses.replace(best, tokens=1024)),
        ("FPQ W4A16", FPQ(input_bits=None)),
    )
    whole = Case("FPQ W4A4E4", best, TEXT, 32, 1024, ((r"(.*[.])?embed_tokens", kept),))
    return [*(on_text(name, method, 32, 1024) for name, method in cases), whole]
