"""Layers over quantized weights: `linen.Any4Dense` and `nnx.Any4Linear`. `swapping` makes Linen models of float layers
compute with quantized weights."""

from any4_jax.nn import linen, nnx, swapping

__all__ = ["linen", "nnx", "swapping"]
