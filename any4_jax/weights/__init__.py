"""Weights as linear operators: a leaf that holds codes into tables, and operators over it.

A new operator is one file: see `any4_jax.weights.operator`.
"""

from any4_jax.weights.binary import binary_planes, bit_planes
from any4_jax.weights.contraction import Contraction, Layout, contraction
from any4_jax.weights.low_rank import LowRank
from any4_jax.weights.operator import (
    Operator,
    Place,
    Trained,
    dense_product,
    dequantize,
    is_operator,
    operator,
    operator_types,
    parts,
    places,
    product,
    take_rows,
)
from any4_jax.weights.outliers import with_outliers
from any4_jax.weights.permute_input import PermuteInput
from any4_jax.weights.quantize_input import QuantizeInput
from any4_jax.weights.quantized_tensor import QuantizedTensor, encode, from_codes
from any4_jax.weights.scale_input import ScaleInput
from any4_jax.weights.slice import Slice, leaf_of, take
from any4_jax.weights.sparse import Sparse, nonzeros, padded_alike, sparse_product, trimmed, with_room
from any4_jax.weights.sum import Sum
from any4_jax.weights.transposed import Transposed

__all__ = [
    "Contraction",
    "Layout",
    "LowRank",
    "Operator",
    "PermuteInput",
    "Place",
    "QuantizeInput",
    "QuantizedTensor",
    "ScaleInput",
    "Slice",
    "Sparse",
    "Sum",
    "Trained",
    "Transposed",
    "binary_planes",
    "bit_planes",
    "contraction",
    "dense_product",
    "dequantize",
    "encode",
    "from_codes",
    "is_operator",
    "leaf_of",
    "nonzeros",
    "operator",
    "operator_types",
    "padded_alike",
    "parts",
    "places",
    "product",
    "sparse_product",
    "take",
    "take_rows",
    "trimmed",
    "with_outliers",
    "with_room",
]
