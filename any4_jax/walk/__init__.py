"""The walk over a model, which calibrates and quantizes it."""

from any4_jax.walk.calibrate import calibrate
from any4_jax.walk.quantize import quantize_model

__all__ = ["calibrate", "quantize_model"]
