"""CUDA and C++ kernels behind `jax.ffi`: plain arrays in, plain arrays out, and their build and registration.

`python -m cuda_ffi.build` builds the native libraries where an installation has none; registration.py says how they
are found and how a handler is added; layout.py states how weights lie in memory.
"""
