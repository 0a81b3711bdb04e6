"""A layer and its inputs, small enough for float64, on which the tests of GPTQ agree."""

import jax.numpy as jnp
import numpy as np

from any4_jax import statistics
from any4_jax.methods import NF4, Any4, Int, quantize
from any4_jax.statistics import Hessian
from any4_jax.weights import QuantizedTensor, dequantize

N, K, G = 12, 48, 16
INT, NF, ANY4, ANY3 = Int(group_size=G), NF4(group_size=G), Any4(group_size=G), Any4(bits=3, group_size=G)
FLOAT_INT = Int(group_size=G, zero_point="float", scale_dtype="float32", table_dtype="float32")


def layer(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(4, (N, K)).astype(np.float32)


def activations(tokens: int = 300, k: int = K) -> np.ndarray:
    """Inputs [T, K] that depend on each other, of different sizes."""
    rng = np.random.default_rng(7)
    mixed = rng.normal(size=(tokens, k)) @ (np.eye(k) + rng.normal(size=(k, k)) / np.sqrt(k))
    return (mixed * 10.0 ** rng.uniform(-0.5, 0.5, k)).astype(np.float32)


X = activations()
H = np.asarray(statistics.from_activations(X, statistics=[Hessian()])[Hessian()].mean, np.float64)


def run(w, method, x=X):
    gathered = statistics.from_activations(x, statistics=dict.fromkeys((*method.needs, Hessian())))
    return quantize(jnp.asarray(w), method, gathered)


def output_error(w, q) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    gap = np.asarray(w, np.float64) - np.asarray(dequantize(q), np.float64)
    return float(np.einsum("nk,kl,nl->", gap, H, gap))


def levels(q: QuantizedTensor, group: int) -> np.ndarray:
    """The values [N, E] that a group's weights may take."""
    table = np.broadcast_to(np.asarray(q.lut, np.float64), (N, q.lut.shape[1]))
    offset = 0.0 if q.offsets is None else np.asarray(q.offsets, np.float64)[:, group, None]
    return table * np.asarray(q.scales, np.float64)[:, group, None] + offset
