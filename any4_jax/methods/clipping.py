"""A narrower range than a group's own: large weights lose, and all others have a finer grid."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from any4_jax import formats, scaling

_SHARES = 80
"""Ranges that are tried: from the whole one down to 0.21 of it, in steps of a hundredth, as GPTQ's code does."""

STEPS = 20
"""AWQ's code takes a twentieth of a group's largest magnitude off at a time: after so many nothing would be left."""


def clipped_scales(
    scale: Callable[[jax.Array], scaling.GroupScales],
    w: jax.Array,
    importance: jax.Array,
    lut: jax.Array,
    *,
    group_size: int,
    uniform: bool,
) -> scaling.GroupScales:
    """For each group the scale and offset of least error sum_k importance_k (w_k - w^_k)^2 among all ranges tried.

    Args:
      scale: scales and offsets [N, groups] of weights [N, K], in stored dtypes, from the groups' extremes.
      w: float32 [N, K].
      importance: float32 [K].
      lut: the table [N or 1, 2**bits] as stored.
      group_size: G, at most K.
      uniform: whether the table is an arithmetic ramp.
    """
    n, k = w.shape
    short = -k % group_size
    table = jnp.broadcast_to(lut.astype(jnp.float32), (n, lut.shape[1]))
    # Weights whose scales are exponents come as they are, and their squares leave float32 before they do.
    unit = scaling.unit(w, jnp.float32)

    def error(made: scaling.GroupScales) -> jax.Array:
        """[N, groups]."""
        codes = formats.nearest(scaling.normalize(w, *made, group_size), lut, uniform=uniform)
        found = jnp.take_along_axis(table, codes.astype(jnp.int32), axis=1)
        found = found * scaling.expand(scaling.scale_values(made.scales), group_size, k)
        if made.offsets is not None:
            found = found + scaling.expand(made.offsets.astype(jnp.float32), group_size, k)
        lost = jnp.pad(importance * jnp.square((w - found) / unit), ((0, 0), (0, short)))
        return lost.reshape(n, -1, group_size).sum(axis=2)

    def narrow(step: jax.Array, best: tuple[jax.Array, scaling.GroupScales]) -> tuple[jax.Array, scaling.GroupScales]:
        least, chosen = best
        # Scales and offsets follow the weights that they are made for.
        made = scale(w * (1 - step.astype(jnp.float32) / 100))
        now = error(made)
        better = now < least
        chosen = jax.tree.map(lambda new, old: jnp.where(better, new, old), made, chosen)
        return jnp.minimum(now, least), chosen

    whole = scale(w)
    return jax.lax.fori_loop(1, _SHARES, narrow, (error(whole), whole))[1]


def clipped_weights(
    quantized: Callable[[jax.Array], jax.Array], w: jax.Array, x: jax.Array, *, group_size: int, steps: int
) -> jax.Array:
    """Weights of which each group is clipped to a share of its largest magnitude, as AWQ does it (arXiv 2306.00978).

    Of the shares 1, 0.95, 0.9 and so on, a group takes that for which its own part of the row's output is closest to
    what it was: the least sum over the tokens of (sum over the group of (w^_k - w_k) x_k)^2.

    Args:
      quantized: weights [N, K] -> what stands for them, [N, K].
      w: float32 [N, K].
      x: a sample of inputs, float32 [S, K].
      group_size: G, at most K.
      steps: how many shares are tried, at most STEPS.

    Returns:
      float32 [N, K].
    """
    k = w.shape[1]
    short = -k % group_size

    def grouped(rows: jax.Array) -> jax.Array:
        return jnp.pad(rows, ((0, 0), (0, short))).reshape(rows.shape[0], -1, group_size)

    unit = scaling.unit(w, jnp.float32)
    tokens = grouped(x).swapaxes(0, 1)
    moments = jnp.matmul(tokens.swapaxes(1, 2), tokens, precision=jax.lax.Precision.HIGHEST)
    largest = jnp.abs(grouped(w)).max(axis=2)

    def clip(share: jax.Array) -> jax.Array:
        limit = scaling.expand(largest * share, group_size, k)
        return jnp.clip(w, -limit, limit)

    def narrow(step: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        least, chosen = best
        share = 1 - step.astype(jnp.float32) / STEPS
        lost = grouped((quantized(clip(share)) - w) / unit)
        mixed = jnp.einsum("ngk,gkl->ngl", lost, moments, precision=jax.lax.Precision.HIGHEST)
        error = (mixed * lost).sum(axis=2)
        return jnp.minimum(error, least), jnp.where(error < least, share, chosen)

    start = jnp.full(largest.shape, jnp.inf), jnp.ones(largest.shape)
    return clip(jax.lax.fori_loop(0, steps, narrow, start)[1])
