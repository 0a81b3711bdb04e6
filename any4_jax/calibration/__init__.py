"""Calibration: statistics of the activations that enter each linear layer."""

from any4_jax.calibration.calibrate import calibrate

__all__ = ["calibrate"]
