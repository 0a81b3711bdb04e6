"""Reads and replaces the operators of a quantized model by path."""

from collections.abc import Callable
from typing import Any

from any4_jax.surgery.containers import container_of
from any4_jax.surgery.rules import matching


def quantized_leaves(model: Any) -> dict[str, Any]:
    """The operators of a quantized model, by dotted path; any model that `quantize_model` takes."""
    return container_of(model).operators(model)


def map_operators(model: Any, function: Callable[[str, Any], Any], pattern: str = r".*") -> Any:
    """The model with each quantized linear's operator replaced by function(path, operator).

    Args:
      model: see `quantize_model`.
      function: (path, operator) -> an operator of the same shape.
      pattern: regex that must match the whole path of a linear; other linears keep their operators.

    Returns:
      A new model; `model` stays as it was.

    Raises:
      ValueError: `pattern` doesn't compile or matches no quantized linear, or a new operator has another shape.
    """
    container = container_of(model)
    operators = container.operators(model)
    new = {path: function(path, operators[path]) for path in matching(operators, pattern)}
    for path, operator in new.items():
        if operator.shape != operators[path].shape:
            raise ValueError(
                f"{path}: got an operator of shape {operator.shape}, need {operators[path].shape}; keep the shape"
            )
    return container.replace(model, new, None)
