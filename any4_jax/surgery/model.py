"""The operators of a quantized model, of any kind, by path: read and replaced."""

from collections.abc import Callable
from typing import Any

from any4_jax.surgery.containers import container_of
from any4_jax.surgery.rules import matching


def quantized_leaves(model: Any) -> dict[str, Any]:
    """The operators of a quantized model, of any kind that `quantize_model` takes, by dotted path."""
    return container_of(model).operators(model)


def map_operators(model: Any, function: Callable[[str, Any], Any], pattern: str = r".*") -> Any:
    """The model with each quantized layer's operator replaced by function(path, operator).

    Args:
      model: see `quantize_model`.
      function: gives an operator of the same shape.
      pattern: regex of the whole paths of the layers meant.

    Raises:
      ValueError: `pattern` doesn't compile or matches no quantized layer; an operator of another shape.
    """
    container = container_of(model)
    operators = container.operators(model)
    new = {path: function(path, operators[path]) for path in matching(operators, pattern)}
    for path, operator in new.items():
        if operator.shape != operators[path].shape:
            raise ValueError(
                f"{path}: got an operator of shape {operator.shape}, need {operators[path].shape}; keep its shape"
            )
    return container.replace(model, new, None)
