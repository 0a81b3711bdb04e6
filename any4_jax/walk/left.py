"""What `quantize_model` says of the matrices that it leaves as they are."""

import warnings
from typing import Any

from flax import nnx

from any4_jax.surgery import DEFAULT_RULES, Rules, pairs
from any4_jax.surgery.coverage import SHARE, arrays_of, coverage, few, named_by
from any4_jax.surgery.linen_modules import is_pair

_RULES = (
    "name each by a rule that quantizes it, such as (r'.*\\.w', method, any4_jax.Einsum('BTD,DNH->BTNH')), or by one "
    "that leaves it, (path, None)"
)


def _advice(model: Any, traced: bool) -> str:
    """What to do about a matrix that is left; `traced` where example inputs told nothing of it."""
    if traced:
        return f"no product reads it in a call with the given inputs; {_RULES}"
    return f"pass example inputs=, {_RULES}" if isinstance(model, nnx.Module) or is_pair(model) else _RULES


def nothing_found(model: Any, found: int, traced: bool = False) -> str:
    """What to say of a model in which nothing is to be quantized."""
    text = f"found {found} linear layers and the rules leave all of them alone"
    there = dict(arrays_of(model))
    return (
        f"{text}; name one to quantize"
        if found or not there
        else f"{text}; it has {few(there)}: {_advice(model, traced)}"
    )


def tell_what_is_left(model: Any, rules: Rules | None, strict: bool, traced: bool = False) -> None:
    """Warns of matrices that stay float although no rule says so; with `strict`, raises ValueError."""
    whole = coverage(model)
    left = whole.unnamed(named_by(pattern for pattern, _ in (*pairs(rules), *DEFAULT_RULES)))
    weights = sum(one.size for one in left.values())
    if left and (strict or weights > SHARE * (whole.weights + weights)):
        count = len(whole.done) + len(whole.left)
        message = (
            f"quantized {len(whole.done)} of {count} matrices, {100 * whole.share:.3g} % of their weights; left, and "
            f"named by no rule: {few(left)}; {_advice(model, traced)}"
        )
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)
