"""Layers over quantized weights; import `any4_jax.nn.nnx` for Flax NNX."""
