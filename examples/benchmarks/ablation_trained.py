"""The study of ablations.py of methods that train blocks."""

import dataclasses
from typing import Any

from ablation_case import OTHER, Case, fixed, on_text

from any4_jax.methods import GPTQ, Any4, Int, Tune, ZeroQuant


def tune(g: int) -> list[Case]:
    """Blocks trained on the float model's outputs: from which codes, and what is trained; fewer bits; integers, with
    inputs rounded and not; then another domain."""
    any4, int4 = Any4(group_size=g), Int(group_size=g, clip=True)
    any3, int8_tables = Any4(bits=3, group_size=g), Any4(group_size=g, table_dtype="int8")
    best = Tune(GPTQ(any4), rounding=True)
    choices: tuple[tuple[str, dict[str, Any]], ...] = (
        ("codes fixed", dict(rounding=False)),
        ("norms too", dict(norms=True)),
        ("rate 0.004", dict(learning_rate=4e-3)),
        ("rate 0.001", dict(learning_rate=1e-3)),
        ("400 steps", dict(steps=400)),
    )
    zero = {f"W{bits}/8A8": ZeroQuant(bits=bits) for bits in (4, 8)}
    zero["W4/8A16"] = ZeroQuant(input_bits=None)
    return [
        on_text("any4", any4),
        on_text("any4, tuned, codes fixed", Tune(any4)),
        on_text("any4, tuned", Tune(any4, rounding=True)),
        on_text("GPTQ any4", GPTQ(any4)),
        on_text("GPTQ any4, tuned", best),
        *(on_text(f"GPTQ any4, tuned, {name}", dataclasses.replace(best, **fields)) for name, fields in choices),
        on_text("any4, int8 tables, tuned", Tune(int8_tables, rounding=True)),
        on_text("any3, tuned", Tune(any3, rounding=True)),
        on_text("GPTQ any3, tuned", Tune(GPTQ(any3), rounding=True)),
        on_text("GPTQ any3, 4 refits, tuned", Tune(GPTQ(any3, refits=4), rounding=True)),
        on_text("int4, tuned", Tune(int4, rounding=True)),
        on_text("GPTQ int4, tuned", Tune(GPTQ(int4), rounding=True)),
        on_text("int3, tuned", Tune(dataclasses.replace(int4, bits=3), rounding=True)),
        *(fixed(f"ZeroQuant {name}", method) for name, method in zero.items()),
        *(
            on_text(f"ZeroQuant {name}, LKD of {words}", dataclasses.replace(method, lkd=lkd))
            for name, method in zero.items()
            for lkd, words in (("all", "all blocks"), ("last", "the last block"))
        ),
        *(
            Case(name, method, OTHER)
            for name, method in (
                ("any4", any4),
                ("any4, tuned", Tune(any4, rounding=True)),
                ("GPTQ any4", GPTQ(any4)),
                ("GPTQ any4, tuned", best),
            )
        ),
    ]
