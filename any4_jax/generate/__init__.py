"""Generates text: jitted prefill and decoding, sampling, streaming, texts that grow in turns."""

from any4_jax.generate.chat import Chat
from any4_jax.generate.chunk import Chunk, Continuation
from any4_jax.generate.loop import generate_chunks, generate_tokens
from any4_jax.generate.session import Session
from any4_jax.generate.streaming import TextStream
from any4_jax.generate.text import generate

__all__ = [
    "Chat",
    "Chunk",
    "Continuation",
    "Session",
    "TextStream",
    "generate",
    "generate_chunks",
    "generate_tokens",
]
