"""any4_jax: learned 4-bit weights for language models in JAX."""

from any4_jax import clustering, data, evaluation, methods, models, nn, statistics, surgery
from any4_jax.checkpoint import from_arrays, load, save, to_arrays
from any4_jax.generate import generate
from any4_jax.layer import layer
from any4_jax.matmul import matmul, prepare, unprepare
from any4_jax.methods import quantize
from any4_jax.partition import combine, partition
from any4_jax.surgery import explain
from any4_jax.training import add_lora, trainable
from any4_jax.walk import calibrate, quantize_model
from any4_jax.weights import QuantizedTensor, dequantize

__version__ = "0.1.0"

__all__ = [
    "QuantizedTensor",
    "add_lora",
    "calibrate",
    "clustering",
    "combine",
    "data",
    "dequantize",
    "evaluation",
    "explain",
    "from_arrays",
    "generate",
    "layer",
    "load",
    "matmul",
    "methods",
    "models",
    "nn",
    "partition",
    "prepare",
    "quantize",
    "quantize_model",
    "save",
    "statistics",
    "surgery",
    "trainable",
    "to_arrays",
    "unprepare",
]
