"""CUDA and C++ kernels behind `jax.ffi`: plain arrays in, plain arrays out, and their build and registration.

This version ships none: every product takes the XLA path of `any4_jax.matmul`.
"""
