"""Generates text: jitted prefill and decoding, sampling, streaming."""

from any4_jax.generate.chunk import Chunk, Continuation
from any4_jax.generate.loop import generate_chunks, generate_tokens
from any4_jax.generate.streaming import TextStream
from any4_jax.generate.text import generate

__all__ = ["Chunk", "Continuation", "TextStream", "generate", "generate_chunks", "generate_tokens"]
