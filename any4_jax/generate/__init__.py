"""Generates text: jitted prefill and decoding, sampling, streaming."""

from any4_jax.generate.loop import generate_tokens
from any4_jax.generate.text import generate

__all__ = ["generate", "generate_tokens"]
