"""Tables trained by gradient descent on the layer's output: the neural variant of any4.

The clustering and the refit take inputs as uncorrelated. Here the inputs are a sample of tokens, so that errors may be
large where they cancel in the products. The sample must be large compared to K for that: trained on the 157 tokens of
one prompt, SmolLM2-135M loses 0.104 nats a token, where the exact tables that the training starts from lose 0.084.
"""

import jax
import jax.numpy as jnp
import optax

from any4_jax import formats, scaling

LEARNING_RATE = 3e-3
"""For Adam, on tables scaled to [-1, 1], where neighbours among 16 entries are about 0.1 apart."""

HIGHEST = jax.lax.Precision.HIGHEST


def train_tables(
    w: jax.Array,
    start: jax.Array,
    scales: jax.Array,
    offsets: jax.Array | None,
    *,
    group_size: int,
    importance: jax.Array,
    sample: jax.Array | None,
    steps: int,
    entries: slice = slice(None),
) -> jax.Array:
    """Lowers the error |sample (w - w^)^T|^2 of each row by Adam; w^ are the values of the nearest codes.

    The codes are chosen again at each step, and the gradient passes to the chosen entries alone. The learning rate
    decays to zero over `steps` (cosine). The best table seen, rounded to its dtype, is kept, so no error rises.

    Args:
      w: float32 [R, K].
      start: tables [R, entries] in the dtype to be stored, ascending.
      scales, offsets: [R, ceil(K/G)] in stored dtypes, offsets may be None; they stay as they are.
      group_size: G.
      importance: float32 [K]; without a sample the error is sum_k importance_k (w_k - w^_k)^2.
      sample: inputs of the layer, float32 [S, K], or None.
      steps: the number of Adam's steps.
      entries: the table entries that may change.

    Returns:
      [R, entries] in the dtype of `start`, ascending.
    """
    k, dtype = w.shape[1], start.dtype
    u = scaling.normalize(w, scales, offsets, group_size)
    s = scaling.expand(scaling.scale_values(scales), group_size, k)
    # Rows and inputs are scaled to a size of one, so that Adam's epsilon is small compared to every gradient.
    peak = jnp.abs(s).max(axis=1, keepdims=True)
    s = s / jnp.where(peak == 0, 1.0, peak)
    seen = jnp.sqrt(importance)[None] if sample is None else sample
    seen = seen / jnp.maximum(jnp.sqrt(jnp.square(seen).sum()), jnp.finfo(jnp.float32).tiny)
    first = start.astype(jnp.float32)
    reach = jnp.abs(first).max(axis=1, keepdims=True)
    reach = jnp.where(reach == 0, 1.0, reach)
    movable = jnp.zeros(first.shape[1], bool).at[entries].set(True)
    # An end that stays bounds the others.
    lowest = jnp.where(movable[0], -jnp.inf, first[:, :1] / reach)
    highest = jnp.where(movable[-1], jnp.inf, first[:, -1:] / reach)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, max(steps, 1)))

    def by_row(tables):
        codes = formats.nearest(u, jax.lax.stop_gradient(tables))
        # A product with one-hot codes rather than a gather: a gather's gradient is a scatter, whose order of additions
        # is not fixed on a GPU.
        picked = jax.nn.one_hot(codes, tables.shape[1], dtype=tables.dtype)
        gap = s * (u - jnp.einsum("rke,re->rk", picked, tables, precision=HIGHEST))
        if sample is None:
            return jnp.square(seen * gap).sum(axis=1)
        return jnp.square(jnp.einsum("rk,sk->rs", gap, seen, precision=HIGHEST)).sum(axis=1)

    def stored(tables):
        return scaling.rounded(tables * reach, dtype).astype(jnp.float32)

    def loss(tables):
        return by_row(tables * reach).sum()

    def step(_, state):
        tables, moments, best, least = state
        slope = jax.grad(loss)(tables)
        with jax.numpy_dtype_promotion("standard"):  # optax's schedule divides an integer
            updates, moments = optimizer.update(slope, moments)
        tables = jnp.sort(jnp.clip(tables + jnp.where(movable, updates, 0.0), lowest, highest), axis=1)
        error = by_row(stored(tables))
        better = error < least
        return tables, moments, jnp.where(better[:, None], stored(tables), best), jnp.where(better, error, least)

    tables = first / reach
    state = (tables, optimizer.init(tables), first, by_row(first))
    return jax.lax.fori_loop(0, steps, step, state)[2].astype(dtype)
