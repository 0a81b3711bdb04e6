"""Rounds the inputs of a quantized model's layers, so that they multiply as integers."""

import dataclasses
from typing import Any, Literal

from any4_jax.product.quantized_input import is_integer_product, why_no_bytes
from any4_jax.surgery.model import map_operators, quantized_leaves
from any4_jax.weights import QuantizedTensor, QuantizeInput, is_operator


def quantize_inputs(model: Any, bits: int = 8, per: Literal["group", "token", "tensor"] = "group") -> Any:
    """The model with `QuantizeInput` around the weights whose integers a kernel multiplies by rounded inputs.

    With the defaults, these have 4-bit codes into tables of int8, or 4- or 8-bit codes of integers, and groups of a
    multiple of 32 weights; others stay as they are. Rounding costs a little accuracy: `any4 eval --inputs int8` tells
    how much. Embeddings are looked up as before.

    Args:
      model: any quantized model that `quantize_model` returns.
      bits, per: see `QuantizeInput`.

    Returns:
      A new model over the same arrays; `model` stays as it was.

    Raises:
      ValueError: no weight of the model can be multiplied so; the message gives a reason.
    """
    leaves = quantized_leaves(model)
    if not leaves:
        raise ValueError("got a model without quantized layers, and inputs are rounded for those; quantize it first")
    reasons: list[str] = []
    done = {
        path: _rounding(operator, QuantizeInput(None, None, bits, True, per), reasons)
        for path, operator in leaves.items()
    }
    if all(done[path] is leaves[path] for path in leaves):
        reason = reasons[0] if reasons else "none holds codes that it could read"
        raise ValueError(
            f"no kernel multiplies a layer of this model by inputs of {bits} bits: {reason}; quantize the float model "
            "with --table-dtype int8, or leave the inputs as they are"
        )
    return map_operators(model, lambda path, operator: done[path])


def _rounding(operator: Any, rounding: QuantizeInput, reasons: list[str]) -> Any:
    """The operator with the rounding around its leaf; itself where no kernel would take that, for a reason it adds."""
    if isinstance(operator, QuantizedTensor):
        wrapped = dataclasses.replace(rounding, inner=operator)
        reason = why_no_bytes(wrapped)
        if reason is None or is_integer_product(wrapped):
            return wrapped
        reasons.append(reason)
        return operator
    inner = getattr(operator, "inner", None)
    if isinstance(operator, QuantizeInput):
        reasons.append(f"they are rounded to {operator.bits} bits already")
    if isinstance(operator, QuantizeInput) or not is_operator(inner):
        return operator
    changed = _rounding(inner, rounding, reasons)
    return operator if changed is inner else dataclasses.replace(operator, inner=changed)
