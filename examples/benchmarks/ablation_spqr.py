"""The study of ablations.py of outliers beside coded matrices."""

import dataclasses
from typing import Any

from ablation_case import OTHER, Case, on_text

from any4_jax.methods import GPTQ, Any4, Int, SpQR


def spqr(g: int) -> list[Case]:
    """Outliers beside 3 and 2 bits, next to the codes that GPTQ chooses alone; then what each choice is worth, and
    another domain. The groups of the published recipes have 16 and 32 weights, those of learned tables `g`."""
    three, two = SpQR(), SpQR(Int(2, group_size=32, zero_point="float"), 0.5)
    learned, alone = Any4(bits=3, group_size=g), Int(3, group_size=16, zero_point="float")
    choices: tuple[tuple[str, dict[str, Any]], ...] = (
        *((f"threshold {threshold:g}", dict(threshold=threshold)) for threshold in (0.1, 0.35, 0.5, 1.0)),
        ("no outliers", dict(threshold=None)),
        ("scales not coded", dict(scale_bits=None, offset_bits=None)),
        ("columns in their order", dict(act_order=False)),
        ("inputs of the float model", dict(sequential=False, asymmetric=0.0)),
        ("groups clipped", dict(inner=dataclasses.replace(alone, clip=True))),
    )
    return [
        on_text("GPTQ int4", GPTQ(inner=Int(group_size=g, clip=True))),
        on_text("GPTQ int3, groups of 16", GPTQ(inner=alone, static_groups=False)),
        on_text("GPTQ any3", GPTQ(inner=Any4(bits=3, group_size=g))),
        on_text("SpQR 3 bits", three),
        on_text("SpQR 3 bits, published", SpQR.paper()),
        on_text("SpQR 2 bits", two),
        on_text("SpQR 2 bits, published", SpQR.paper(inner=two.inner, threshold=two.threshold)),
        on_text("SpQR any3", SpQR(learned)),
        on_text("SpQR any3, groups of 16", SpQR(dataclasses.replace(learned, group_size=16))),
        on_text("SpQR any3, scales not coded", SpQR(learned, scale_bits=None, offset_bits=None)),
        *(on_text(f"SpQR 3 bits, {name}", dataclasses.replace(three, **fields)) for name, fields in choices),
        Case("SpQR 3 bits", three, OTHER),
    ]
