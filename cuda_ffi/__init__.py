"""CUDA and C++ kernels behind `jax.ffi`: plain arrays in, plain arrays out.

`python -m cuda_ffi.build` builds the native libraries where an installation has none. registration.py says how they
are found and how to add a handler; layout.py states how weights lie in memory.
"""
