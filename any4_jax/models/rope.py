"""Rotary position embedding of the Llama family."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.models.config import LlamaConfig, RopeScaling


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotates the channel pairs (i, i + D/2) by position * frequency[i] (RoFormer, arXiv:2104.09864, eq. 34).

    Pairing the halves is the convention of Hugging Face checkpoints, whose q and k projections are permuted for it.
    The fields are hashable numbers, and the frequencies are computed while tracing, so blocks share one program.
    """

    head_dim: int
    theta: float
    scaling: RopeScaling | None = None

    @classmethod
    def of(cls, config: LlamaConfig) -> "Rope":
        """The rope of a model."""
        return cls(config.head_dim, config.rope_theta, config.rope_scaling)

    def frequencies(self) -> np.ndarray:
        """Radians per position, float32 [D/2]; with `scaling`, Llama 3.1's rule stretches long wavelengths."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        frequencies = np.float32(1) / np.float32(self.theta) ** exponents
        if self.scaling is None:
            return frequencies
        # turns = rotations within the context that the model was first trained on. A frequency with fewer turns than
        # low_freq_factor is divided by `factor`, one with more than high_freq_factor is kept, others are blended.
        s = self.scaling
        turns = s.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
        return ((1 - kept) * frequencies / s.factor + kept * frequencies).astype(np.float32)

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotate x [B, T, heads, D] by positions int32 [B, T]; computes in float32, returns x's dtype."""
        angles = positions.astype(jnp.float32)[:, :, None, None] * self.frequencies()[None, None, None]
        # Without a barrier XLA recomputes both for every head, in the fusion that rotates.
        cos, sin = jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))
        low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
