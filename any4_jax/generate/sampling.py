"""Chooses the next token from logits: greedy, temperature, top-k, top-p."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_k", "top_p", "seed"],
    meta_fields=["greedy"],
)
@dataclasses.dataclass(frozen=True)
class Sampler:
    """How to sample. All fields but `greedy` are traced scalars: one program is greedy, one other serves all settings.

    Attributes:
        temperature: float32 > 0.
        top_k: int32; only this many likeliest tokens stay. The vocabulary's size keeps all.
        top_p: float32; only the likeliest tokens that together have this probability stay. 1 keeps all.
        seed: uint32.
        greedy: take the likeliest token, whatever the other fields say. Static, because compiling the sampler takes as
            long as compiling a small model.
    """

    temperature: np.ndarray | jax.Array
    top_k: np.ndarray | jax.Array
    top_p: np.ndarray | jax.Array
    seed: np.ndarray | jax.Array
    greedy: bool

    @classmethod
    def of(cls, vocabulary: int, temperature: float, top_k: int | None, top_p: float | None, seed: int) -> "Sampler":
        """A sampler from a user's settings; None means no limit, temperature 0 is greedy.

        Raises:
            ValueError: temperature is negative or not finite, top_k < 1, or top_p is outside (0, 1].
        """
        if not (np.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature is {temperature}, and a finite number >= 0 is needed; 0 is greedy")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}, and at least 1 token must stay; use None for no limit")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}, and a number in (0, 1] is needed; use None for no limit")
        return cls(
            np.asarray(temperature, np.float32),
            np.asarray(vocabulary if top_k is None else min(top_k, vocabulary), np.int32),
            np.asarray(1.0 if top_p is None else top_p, np.float32),
            np.asarray(seed % 2**32, np.uint32),
            greedy=temperature == 0,
        )

    def sample(self, logits: jax.Array, step: jax.Array | int) -> jax.Array:
        """float32 logits [B, V] -> int32 tokens [B]; equal seeds and steps draw equal tokens."""
        if self.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        scaled = logits / self.temperature
        limited = (self.top_k < logits.shape[-1]) | (self.top_p < 1)
        # A branch, because the sort behind it costs more than the rest of sampling together.
        scaled = jax.lax.cond(limited, self._limit, lambda scaled: scaled, scaled)
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        return jax.random.categorical(key, scaled, axis=-1).astype(jnp.int32)

    def _limit(self, scaled: jax.Array) -> jax.Array:
        """Sets all scaled logits [B, V] except those of the top-k and top-p tokens to -inf.

        Top-p (arXiv:1904.09751) applies to the tokens that top-k keeps, and always keeps the likeliest token.
        """
        order = jnp.argsort(scaled, axis=-1, descending=True)
        ranked = jnp.take_along_axis(scaled, order, axis=-1)
        rank = jnp.arange(scaled.shape[-1])[None]
        ranked = jnp.where(rank < self.top_k, ranked, -jnp.inf)
        probability = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        # A float32 sum may reach 1 before the last token, and top_p = 1 must still keep every token.
        stays = (rank == 0) | (before < self.top_p) | (self.top_p >= 1)
        ranked = jnp.where(stays, ranked, -jnp.inf)
        return jnp.put_along_axis(scaled, order, ranked, axis=-1, inplace=False)
