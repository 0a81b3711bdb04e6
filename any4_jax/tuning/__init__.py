"""Training what is quantized end to end, on the float model's predictions."""

from any4_jax.tuning.tune import tune

__all__ = ["tune"]
