"""Quantize a whole model. The one that is passed in stays as it was; the new one shares the arrays left alone."""

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

from any4_jax.methods import Method
from any4_jax.statistics import Statistics
from any4_jax.surgery.kinds import kind_of, recipe_of
from any4_jax.surgery.layers import Finished, Progress, quantize_layers
from any4_jax.surgery.rules import DEFAULT_RULES, Recipe, Rules, matching, resolve


def quantize_model(
    model: Any,
    method: Method | None,
    *,
    stats: Mapping[str, Statistics] | None = None,
    rules: Rules | None = None,
    inputs: Any = None,
    progress: Progress | None = None,
    finished: Finished | None = None,
) -> Any:
    """The model with its dense layers quantized.

    Args:
      model: one of
        - an NNX module: every nnx.Linear becomes an Any4Linear, every nnx.Embed that a rule names an Any4Embed;
        - a Hugging Face Flax model: its kernels become operators, and it goes on working, `generate` included;
        - a pair (Linen module, variables or their "params"): the new pair's module has the same `apply` and `init`;
        - a tree of arrays (dicts and lists), where "kernel" is [K, N] and "weight" is [N, K].
      method: for the layers that no rule decides; None leaves these alone.
      stats: statistics of the input of each layer by path, as `calibrate` returns them.
      rules: see `resolve`.
      inputs: for a Linen pair, example arguments of `apply` (a tuple, or a dict by name; ShapeDtypeStructs will do),
        by which its Dense layers are found, stacked ones too. None takes every two-dimensional "kernel" for one.
      progress: called with (done, total, path) after each layer.
      finished: where each layer is kept as soon as it is done, and looked for before any is computed; layers that it
        holds under their `layer_key` are taken from there. None keeps nothing.

    Returns:
      A new model of the same kind.

    Raises:
      ValueError: no layer to quantize, a rule that matched nothing, a method that needs statistics where none are
        given for the path, weights that are not finite.
    """
    kind = kind_of(model)
    matrices = kind.matrices(model, inputs)
    by_name = {path for path, matrix in matrices.items() if matrix.by_name}
    chosen = resolve(matrices, method, rules, by_name)
    if not chosen:
        found = len(matrices) - len(by_name)
        raise ValueError(f"found {found} linear layers and the rules leave all of them alone; name one to quantize")
    stats = stats or {}
    done = quantize_layers(matrices, chosen, stats, progress, finished)
    earlier = recipe_of(model)
    decided = [(p, m, tuple(sorted(m.notes(p in stats).items()))) for p, m in chosen.items()]
    recipe = Recipe(
        rules=tuple((p, m) for p, m in (*(rules or ()), *DEFAULT_RULES, (r".*", method))),
        layers=tuple(sorted((*(earlier.layers if earlier else ()), *decided), key=itemgetter(0))),
    )
    return kind.replace(model, done, recipe)


def quantized_leaves(model: Any) -> dict[str, Any]:
    """The operators of a quantized model, of any kind that `quantize_model` takes, by dotted path."""
    return kind_of(model).operators(model)


def map_operators(model: Any, function: Callable[[str, Any], Any], pattern: str = r".*") -> Any:
    """The model with each quantized layer's operator replaced by function(path, operator).

    Args:
      model: see `quantize_model`.
      function: gives an operator of the same shape.
      pattern: regex of the whole paths of the layers meant.

    Raises:
      ValueError: `pattern` doesn't compile or matches no quantized layer; an operator of another shape.
    """
    kind = kind_of(model)
    operators = kind.operators(model)
    new = {path: function(path, operators[path]) for path in matching(operators, pattern)}
    for path, operator in new.items():
        if operator.shape != operators[path].shape:
            raise ValueError(
                f"{path}: got an operator of shape {operator.shape}, need {operators[path].shape}; keep its shape"
            )
    return kind.replace(model, new, None)
