"""Quantization methods: each a frozen dataclass that is configuration, flags and manifest entry at once."""

from any4_jax.methods.any4 import Any4
from any4_jax.methods.base import Method, quantize
from any4_jax.methods.rtn import AF4, FP4, MX4, NF4, Int

CATALOGUE: dict[str, type] = {cls.name: cls for cls in (Int, NF4, FP4, AF4, MX4, Any4)}
"""Methods by name; a new one is one file and one entry here."""

__all__ = ["AF4", "CATALOGUE", "FP4", "MX4", "NF4", "Any4", "Int", "Method", "quantize"]
