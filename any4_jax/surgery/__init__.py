"""Surgery: replace the dense layers of a model, whatever it is made of, by quantized ones."""

from any4_jax.surgery.explain import explain
from any4_jax.surgery.kinds import Kind, kind_of, recipe_of
from any4_jax.surgery.layers import Finished, Matrix, Progress, layer_key, quantize_matrix
from any4_jax.surgery.model import map_operators, quantize_model, quantized_leaves
from any4_jax.surgery.nnx_modules import (
    around,
    copy_module,
    holders,
    linears,
    matrix_of,
    quantize_linear,
    replace_module,
)
from any4_jax.surgery.rules import DEFAULT_RULES, Recipe, Rules, resolve

__all__ = [
    "DEFAULT_RULES",
    "Finished",
    "Kind",
    "Matrix",
    "Progress",
    "Recipe",
    "Rules",
    "around",
    "copy_module",
    "explain",
    "holders",
    "kind_of",
    "layer_key",
    "linears",
    "map_operators",
    "matrix_of",
    "quantize_linear",
    "quantize_matrix",
    "quantize_model",
    "quantized_leaves",
    "recipe_of",
    "replace_module",
    "resolve",
]
