"""GPU kernels in Pallas: plain arrays in, plain arrays out; they know nothing of the library that calls them.

This version ships none: every product takes the XLA path of `any4_jax.matmul`.
"""
