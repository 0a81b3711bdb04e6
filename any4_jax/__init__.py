"""any4_jax: learned 4-bit weights for language models in JAX."""

from any4_jax import clustering, data, evaluation, methods, models, statistics, surgery
from any4_jax.calibration import calibrate
from any4_jax.checkpoint import load, save
from any4_jax.generate import generate
from any4_jax.matmul import explain, matmul, prepare, unprepare
from any4_jax.methods import quantize
from any4_jax.surgery import quantize_model
from any4_jax.weights import QuantizedTensor, combine, dequantize, partition

__version__ = "0.1.0"

__all__ = [
    "QuantizedTensor",
    "calibrate",
    "clustering",
    "combine",
    "data",
    "dequantize",
    "evaluation",
    "explain",
    "generate",
    "load",
    "matmul",
    "methods",
    "models",
    "partition",
    "prepare",
    "quantize",
    "quantize_model",
    "save",
    "statistics",
    "surgery",
    "unprepare",
]
