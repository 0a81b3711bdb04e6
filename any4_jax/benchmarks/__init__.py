"""The measurements of `any4 bench`, and the format in which every benchmark of the project writes its figures."""

from any4_jax.benchmarks.machine import result
from any4_jax.benchmarks.schema import Device, Result, read, write

__all__ = ["Device", "Result", "read", "result", "write"]
