"""What `any4 bench` measures, and the form in which every benchmark of the project writes its figures."""

from any4_jax.benchmarks.machine import result
from any4_jax.benchmarks.schema import Device, Result, read, write

__all__ = ["Device", "Result", "read", "result", "write"]
