"""Penalties: logits of tokens that are in the text already are lowered. B rows, V vocabulary."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.generate.arguments import real
from any4_jax.pytree import register_dataclass


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """The tokens that each row has.

    Attributes:
        prompt: bool [B, V], which tokens the prompt has.
        new: int32 [B, V], how often each token has been generated.
    """

    prompt: jax.Array
    new: jax.Array

    @classmethod
    def of(cls, tokens: jax.Array, start: jax.Array, vocabulary: int) -> "Counts":
        """The counts of prompts int32 [B, T], whose row b begins at column start[b]."""
        batch, length = tokens.shape
        # Padding is counted beside the vocabulary, where it is dropped.
        tokens = jnp.where(jnp.arange(length)[None] >= start[:, None], tokens, vocabulary)
        rows = jnp.arange(batch)[:, None]
        prompt = jnp.zeros((batch, vocabulary), bool).at[rows, tokens].set(True, mode="drop")
        return cls(prompt, jnp.zeros((batch, vocabulary), jnp.int32))

    def add(self, token: jax.Array) -> "Counts":
        """With one more generated token per row, int32 [B]."""
        return Counts(self.prompt, self.new.at[jnp.arange(len(token)), token].add(1, mode="drop"))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Penalties:
    """How much, as traced float32 scalars; the three apply in this order, before the temperature.

    Attributes:
        repetition: the logit of a token in the prompt or the new text is divided by this if above 0, else multiplied
            (arXiv:1909.05858, as in `transformers` and vLLM); 1 changes nothing.
        frequency: subtracted from a token's logit for each time that it has been generated (as in vLLM).
        presence: subtracted once from the logits of tokens that have been generated (as in vLLM).
    """

    repetition: np.ndarray | jax.Array
    frequency: np.ndarray | jax.Array
    presence: np.ndarray | jax.Array

    @classmethod
    def of(cls, repetition: Any, frequency: Any, presence: Any) -> "Penalties | None":
        """Penalties from a user's settings; None if they change nothing, so that nothing is counted.

        Raises:
            TypeError: one is no number.
            ValueError: repetition is not above 0, or another is outside [-2, 2].
        """
        settings = {
            "repetition_penalty": real(
                "repetition_penalty",
                repetition,
                lambda p: p > 0,
                "a finite number above 0 is needed; 1 changes nothing",
            )
        }
        for name, value in (("frequency_penalty", frequency), ("presence_penalty", presence)):
            settings[name] = real(name, value, lambda p: abs(p) <= 2, "-2 to 2 is needed; 0 changes nothing")
        if tuple(settings.values()) == (1, 0, 0):
            return None
        return cls(*(np.asarray(value, np.float32) for value in settings.values()))

    def apply(self, logits: jax.Array, counts: Counts) -> jax.Array:
        """float32 logits [B, V] -> penalized logits [B, V]."""
        repeated = jnp.where(logits > 0, logits / self.repetition, logits * self.repetition)
        logits = jnp.where(counts.prompt | (counts.new > 0), repeated, logits)
        logits = logits - self.frequency * counts.new.astype(jnp.float32)
        return logits - self.presence * (counts.new > 0).astype(jnp.float32)
