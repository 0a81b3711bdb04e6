"""What an analysis says of each method as a whole."""

import math
from collections.abc import Mapping, Sequence

from any4_jax.evaluation.analysis import LayerAnalysis, MethodLoss


def summary(layers: Sequence[LayerAnalysis]) -> dict[str, dict[str, float]]:
    """For each method, means over the layers: bits per weight by their numbers of weights, the SQNR of weights and
    outputs in dB over the layers that have an error, and the number of layers whose output is nearest by it."""
    weights = [math.prod(each.weights.shape) for each in layers]
    found = {}
    for label in layers[0].methods:
        losses = [each.methods[label] for each in layers]
        bits = sum(n * loss.bits_per_weight for n, loss in zip(weights, losses, strict=True)) / sum(weights)
        best = sum(_nearest(each.methods) == label for each in layers)
        found[label] = {
            "bits_per_weight": bits,
            "weights_sqnr_db": _mean([loss.weights.sqnr for loss in losses]),
            "output_sqnr_db": _mean([loss.output.sqnr for loss in losses]),
            "nearest_in_layers": best,
        }
    return found


def _nearest(methods: Mapping[str, MethodLoss]) -> str:
    return max(methods, key=lambda label: methods[label].output.sqnr)


def _mean(levels: Sequence[float]) -> float:
    finite = [level for level in levels if math.isfinite(level)]
    return sum(finite) / len(finite) if finite else math.inf
