"""Rotary position embedding of decoders."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax.kv_cache import rotate_pairs
from any4_jax.models.rope_scaling import Scaling, plain_frequencies


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotates the channel pairs (i, i + D/2) by position * frequency[i] (RoFormer, arXiv:2104.09864, eq. 34).

    Pairing the halves is the convention of Hugging Face checkpoints, whose q and k projections are permuted for it.
    The fields are hashable numbers, and the frequencies are computed while tracing, so blocks share one program.
    """

    head_dim: int
    theta: float
    scaling: Scaling | None = None

    def frequencies(self, length: jax.Array | None = None) -> Any:
        """Radians per position, float32 [D/2], or [B, D/2] for a scaling that depends on the length of a text; `length`
        int32 [B] is the tokens in each text so far."""
        if self.scaling is None:
            return plain_frequencies(self.theta, self.head_dim)
        return self.scaling.frequencies(self.theta, self.head_dim, length)

    @property
    def is_linear(self) -> bool:
        """Whether angles are proportional to the position, whatever the length of the text."""
        return self.scaling is None or not self.scaling.by_length

    def factors(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(cos, sin) of the angles of positions int32 [B, T], float32 [B, T, D/2]."""
        by_length = self.scaling is not None and self.scaling.by_length
        # Of each row alone, so that a row of a batch equals its single run.
        frequencies = self.frequencies(positions.max(axis=1) + 1 if by_length else None)
        angles = positions.astype(jnp.float32)[:, :, None] * frequencies.reshape(-1, 1, self.head_dim // 2)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if self.scaling is not None and self.scaling.amplitude != 1:
            cos, sin = cos * self.scaling.amplitude, sin * self.scaling.amplitude
        return cos, sin

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotate x [B, T, heads, D] by positions int32 [B, T]; computes in float32, returns x's dtype."""
        return rotate_pairs(x, *self.factors(positions))
