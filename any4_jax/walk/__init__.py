"""The walk over a model, which calibrates and quantizes it."""

from any4_jax.walk.cache import calibrate_cache
from any4_jax.walk.calibrate import calibrate
from any4_jax.walk.quantize import quantize_model
from any4_jax.walk.search_results import load_search_results, save_search_results

__all__ = ["calibrate", "calibrate_cache", "load_search_results", "quantize_model", "save_search_results"]
