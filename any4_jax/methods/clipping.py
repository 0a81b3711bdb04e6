"""Group scales from a narrower range than the group's own: large weights lose, and all others have a finer grid."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from any4_jax import formats, scaling

_SHARES = 80
"""Ranges that are tried: from the whole one down to 0.21 of it, in steps of a hundredth, as GPTQ's code does."""


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
