"""Least-squares polish of a table-coded matrix on its stored dtypes.

The error of a row is sum_k h_k (w_k - lut[c_k] s_g(k) - o_g(k))^2. It is lowered in turn by the codes (nearest), the
table (each entry alone) and the scale and offset (each group alone). An update is rounded to its stored dtype first
and taken only where it lowers the error of what it touches, so no step raises a row's error.
"""

import jax
import jax.numpy as jnp

from any4_jax import formats, scaling


def refit(
    w: jax.Array,
    importance: jax.Array,
    lut: jax.Array,
    scales: jax.Array,
    offsets: jax.Array | None,
    group_size: int,
    *,
    max_iter: int,
    tol: float,
    entries: slice = slice(None),
):
    """Improves (lut, scales, offsets) for rows w [R, K] under importance h [K]; returns them in their dtypes.

    A row stops when an iteration lowers its error by less than `tol` of it. `entries` are those of the table that may
    change; a table [1, 2**bits] that rows share must be left alone (slice(0)).
    """
    free = range(lut.shape[1])[entries]
    h = jnp.broadcast_to(importance, w.shape)

    def step(state):
        count, active, before, lut, scales, offsets = state
        codes = formats.nearest(scaling.normalize(w, scales, offsets, group_size), lut)
        table = _fit_table(w, h, codes, lut, scales, offsets, group_size, free) if free else lut
        new_scales, new_offsets = _fit_groups(w, h, codes, table, scales, offsets, group_size)
        codes = formats.nearest(scaling.normalize(w, new_scales, new_offsets, group_size), table)
        after = _error(w, h, _levels(table, codes), new_scales, new_offsets, group_size).sum(axis=-1)
        better = active & (after < before)
        keep = better[:, None]
        lut = jnp.where(keep, table, lut) if free else lut
        scales = jnp.where(keep, new_scales, scales)
        offsets = None if offsets is None else jnp.where(keep, new_offsets, offsets)
        still = better & (before - after > tol * before)
        return count + 1, still, jnp.where(better, after, before), lut, scales, offsets

    codes = formats.nearest(scaling.normalize(w, scales, offsets, group_size), lut)
    start = _error(w, h, _levels(lut, codes), scales, offsets, group_size).sum(axis=-1)
    state = (jnp.int32(0), jnp.ones(w.shape[0], bool), start, lut, scales, offsets)
    state = jax.lax.while_loop(lambda s: (s[0] < max_iter) & s[1].any(), step, state)
    return state[3:]


def _levels(lut, codes) -> jax.Array:
    table = jnp.broadcast_to(lut.astype(jnp.float32), (codes.shape[0], lut.shape[1]))
    return jnp.take_along_axis(table, codes.astype(jnp.int32), axis=1, mode="promise_in_bounds")


def _error(w, h, levels, scales, offsets, group_size) -> jax.Array:
    """Weighted squared error of each weight, [R, K]."""
    k = w.shape[1]
    values = levels * scaling.expand(scales.astype(jnp.float32), group_size, k)
    if offsets is not None:
        values = values + scaling.expand(offsets.astype(jnp.float32), group_size, k)
    return h * (w - values) ** 2


def _fit_table(w, h, codes, lut, scales, offsets, group_size, free: range) -> jax.Array:
    """Each free entry's weighted least-squares value over the weights that use it."""
    k = w.shape[1]
    s = scaling.expand(scales.astype(jnp.float32), group_size, k)
    target = w if offsets is None else w - scaling.expand(offsets.astype(jnp.float32), group_size, k)

    # A loop in the program, whose body is compiled once.
    def fit(i, table):
        old = jax.lax.dynamic_index_in_dim(table, i, 1)
        mine = codes == i
        mass = jnp.where(mine, h * s * s, 0.0).sum(axis=-1)[:, None]
        value = jnp.where(mine, h * s * target, 0.0).sum(axis=-1)[:, None] / jnp.where(mass == 0, 1.0, mass)
        value = scaling.rounded(jnp.where(mass == 0, old.astype(jnp.float32), value), table.dtype)
        gain = (value.astype(jnp.float32) - old.astype(jnp.float32)) * s
        residual = target - old.astype(jnp.float32) * s
        change = jnp.where(mine, h * gain * (gain - 2 * residual), 0.0).sum(axis=-1)[:, None]
        return jax.lax.dynamic_update_index_in_dim(table, jnp.where(change < 0, value, old), i, 1)

    return jnp.sort(jax.lax.fori_loop(free.start, free.stop, fit, lut), axis=1)


def _fit_groups(w, h, codes, lut, scales, offsets, group_size):
    """Each group's weighted least-squares scale (and offset) for its levels."""
    levels = _levels(lut, codes)
    short = -w.shape[1] % group_size
    w, h, t = (jnp.pad(a, ((0, 0), (0, short))).reshape(w.shape[0], -1, group_size) for a in (w, h, levels))
    mass = h.sum(axis=-1)
    safe = jnp.where(mass == 0, 1.0, mass)
    if offsets is None:
        mean_t = mean_w = jnp.zeros_like(mass)
    else:
        mean_t, mean_w = (h * t).sum(axis=-1) / safe, (h * w).sum(axis=-1) / safe
    dt, dw = t - mean_t[..., None], w - mean_w[..., None]
    spread = (h * dt * dt).sum(axis=-1)
    s = (h * dt * dw).sum(axis=-1) / jnp.where(spread == 0, 1.0, spread)
    s = scaling.rounded(jnp.where((spread > 0) & (s > 0), s, scales.astype(jnp.float32)), scales.dtype)
    o = None if offsets is None else scaling.rounded(mean_w - s.astype(jnp.float32) * mean_t, offsets.dtype)

    def error(s, o):
        values = t * s.astype(jnp.float32)[..., None]
        if o is not None:
            values = values + o.astype(jnp.float32)[..., None]
        return (h * (w - values) ** 2).sum(axis=-1)

    better = error(s, o) < error(scales, offsets)
    return jnp.where(better, s, scales), None if o is None else jnp.where(better, o, offsets)
