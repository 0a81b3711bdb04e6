"""Surgery: finds and replaces the linears of a model, whatever the model is made of."""

from any4_jax.surgery.containers import Container, container_of, recipe_of
from any4_jax.surgery.coverage import Coverage, coverage
from any4_jax.surgery.declarations import Axes, Declaration, Declared, Einsum
from any4_jax.surgery.explain import Explanation, explain, explained
from any4_jax.surgery.inputs import quantize_inputs
from any4_jax.surgery.model import map_operators, quantized_leaves
from any4_jax.surgery.nnx_modules import around, copy_module, holders, linears, matrix_of, replace_module
from any4_jax.surgery.rules import DEFAULT_RULES, Recipe, Rules, Training, declarations, pairs, refuse_special, resolve

__all__ = [
    "DEFAULT_RULES",
    "Axes",
    "Container",
    "Coverage",
    "Declaration",
    "Declared",
    "Einsum",
    "Recipe",
    "Rules",
    "Training",
    "around",
    "container_of",
    "copy_module",
    "coverage",
    "declarations",
    "Explanation",
    "explain",
    "explained",
    "holders",
    "linears",
    "map_operators",
    "matrix_of",
    "pairs",
    "quantize_inputs",
    "quantized_leaves",
    "recipe_of",
    "refuse_special",
    "replace_module",
    "resolve",
]
