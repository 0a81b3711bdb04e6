"""The study of ablations.py of methods that train: blocks on the float model's outputs, then the model as a whole."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ablation_case import OTHER, Case, end_to_end, fixed, on_text

from any4_jax.methods import GPTQ, Any4, Int, Tune, ZeroQuant


def tune(g: int) -> list[Case]:
    """From which codes blocks are trained, and what of them; fewer bits; integers, with inputs rounded and not; then
    another domain. What is trained end to end stands after what it starts from."""
    any4, int4 = Any4(group_size=g), Int(group_size=g, clip=True)
    any3 = Any4(bits=3, group_size=g)
    best, int4_best = Tune(GPTQ(any4), rounding=True), Tune(int4, rounding=True)
    any3_best = Tune(GPTQ(any3), rounding=True)
    return [
        on_text("any4", any4),
        end_to_end(on_text("any4", any4)),
        on_text("any4, tuned, codes fixed", Tune(any4)),
        on_text("any4, tuned", Tune(any4, rounding=True)),
        on_text("GPTQ any4", GPTQ(any4)),
        *_both([on_text("GPTQ any4, tuned", best)]),
        *_choices(best),
        on_text("any3, tuned", Tune(any3, rounding=True)),
        *_both([on_text("GPTQ any3, tuned", any3_best)]),
        on_text("GPTQ any3, 4 refits, tuned", Tune(GPTQ(any3, refits=4), rounding=True)),
        *_both([on_text("int4, tuned", int4_best)]),
        on_text("GPTQ int4, tuned", Tune(GPTQ(int4), rounding=True)),
        on_text("int3, tuned", Tune(dataclasses.replace(int4, bits=3), rounding=True)),
        *_zeroquant(),
        *(Case(name, method, OTHER) for name, method in (("any4", any4), ("GPTQ any4", GPTQ(any4)))),
        *_both(
            [
                Case("GPTQ any4, tuned", best, OTHER),
                Case("GPTQ any3, tuned", any3_best, OTHER),
                Case("int4, tuned", int4_best, OTHER),
            ]
        ),
    ]


def _both(cases: Sequence[Case]) -> list[Case]:
    """Each case, and what follows end to end."""
    return [each for case in cases for each in (case, end_to_end(case))]


def _choices(best: Tune) -> list[Case]:
    """What each choice in the training of blocks is worth, then each in the training that follows."""
    start: Any = best.start
    bfloat16 = dataclasses.replace(start, inner=dataclasses.replace(start.inner, table_dtype="bfloat16"))
    choices: tuple[tuple[str, dict[str, Any]], ...] = (
        ("codes fixed", dict(rounding=False)),
        ("norms too", dict(norms=True)),
        ("rate 0.004", dict(learning_rate=4e-3)),
        ("rate 0.001", dict(learning_rate=1e-3)),
        ("400 steps", dict(steps=400)),
        ("bfloat16 tables", dict(start=bfloat16)),
    )
    tuned = on_text("GPTQ any4, tuned", best)
    after: tuple[tuple[str, dict[str, Any]], ...] = (
        ("rate 0.0005", dict(learning_rate=5e-4)),
        ("rate 0.004, 200 steps", dict(learning_rate=4e-3, steps=200)),
    )
    return [
        *(on_text(f"GPTQ any4, tuned, {name}", dataclasses.replace(best, **fields)) for name, fields in choices),
        *(
            dataclasses.replace(made, name=f"{made.name}, {name}")
            for name, fields in after
            for made in (end_to_end(tuned, **fields),)
        ),
    ]


def _zeroquant() -> list[Case]:
    zero = {f"W{bits}/8A8": ZeroQuant(bits=bits) for bits in (4, 8)}
    zero["W4/8A16"] = ZeroQuant(input_bits=None)
    return [
        *(fixed(f"ZeroQuant {name}", method) for name, method in zero.items()),
        *(
            on_text(f"ZeroQuant {name}, LKD of {words}", dataclasses.replace(method, lkd=lkd))
            for name, method in zero.items()
            for lkd, words in (("all", "all blocks"), ("last", "the last block"))
        ),
    ]
