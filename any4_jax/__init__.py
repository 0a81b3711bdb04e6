"""any4_jax: learned 4-bit weights for language models in JAX."""

# Before all others: Ctrl-C while the command imports them.
import any4_jax.cli.interrupts  # noqa: F401

# isort: split

from any4_jax import clustering, data, evaluation, kv_cache, methods, models, nn, statistics, surgery, weights
from any4_jax.checkpoint import from_arrays, load, save, to_arrays
from any4_jax.generate import generate
from any4_jax.methods import quantize
from any4_jax.partition import combine, partition
from any4_jax.product import matmul, matmul_each
from any4_jax.surgery import Axes, Einsum, explain, quantize_inputs
from any4_jax.training import add_lora, trainable
from any4_jax.tuning import tune
from any4_jax.walk import calibrate, calibrate_cache, quantize_model
from any4_jax.weights import QuantizedTensor, dequantize, take

__version__ = "0.1.0"

__all__ = [
    "Axes",
    "Einsum",
    "QuantizedTensor",
    "add_lora",
    "calibrate",
    "calibrate_cache",
    "clustering",
    "combine",
    "data",
    "dequantize",
    "evaluation",
    "explain",
    "from_arrays",
    "generate",
    "kv_cache",
    "load",
    "matmul",
    "matmul_each",
    "methods",
    "models",
    "nn",
    "partition",
    "quantize",
    "quantize_inputs",
    "quantize_model",
    "save",
    "statistics",
    "surgery",
    "take",
    "to_arrays",
    "trainable",
    "tune",
    "weights",
]
