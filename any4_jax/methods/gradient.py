"""Tables trained by gradient descent: the neural variant of any4, on the same weighted objective as the clustering."""

import jax
import jax.numpy as jnp
import optax

from any4_jax import clustering, formats

LEARNING_RATE = 3e-3
"""Adam's, for rows scaled to [-1, 1], where neighbouring entries of a 16-entry table are about 0.1 apart."""


def gradient_tables(
    rows: jax.Array, entries: int, sample_weight: jax.Array, *, init: str | None, steps: int, seed: int
) -> jax.Array:
    """Minimises sum_k weight_k (row_k - table[nearest])^2 over the tables by Adam.

    The nearest entry is chosen anew at each step and the gradient passes to the chosen entries alone. The learning
    rate decays to zero over `steps` (cosine), and the best table seen is kept.

    Args:
      rows: [R, K] float32.
      entries: size of a table.
      sample_weight: [R, K] float32, not negative.
      init: as Lloyd's; None is k-means++, which puts entries on outliers that steps this small would not reach.

    Returns:
      float32 [R, entries], ascending.
    """
    reach = jnp.abs(rows).max(axis=1, keepdims=True)
    reach = jnp.where(reach == 0, 1.0, reach)
    rows = rows / reach
    total = sample_weight.sum(axis=1, keepdims=True)
    share = jnp.where(total == 0, 1.0 / rows.shape[1], sample_weight / jnp.where(total == 0, 1.0, total))
    start = clustering.kmeans_1d(
        rows, entries, sample_weight=share, solver="lloyd", init=init, max_iter=1, seed=seed
    ).centroids
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, max(steps, 1)))

    def loss(tables):
        codes = formats.nearest(rows, jax.lax.stop_gradient(tables))
        # A product with one-hot codes rather than a gather: a gather's gradient is a scatter, whose order of additions
        # is not fixed on a GPU.
        picked = jax.nn.one_hot(codes, entries, dtype=tables.dtype)
        chosen = jnp.einsum("rke,re->rk", picked, tables, precision=jax.lax.Precision.HIGHEST)
        by_row = (share * (rows - chosen) ** 2).sum(axis=1)
        return by_row.sum(), by_row

    def step(_, state):
        tables, moments, best, lowest = state
        (_, by_row), slope = jax.value_and_grad(loss, has_aux=True)(tables)
        better = by_row < lowest
        best = jnp.where(better[:, None], tables, best)
        updates, moments = optimizer.update(slope, moments)
        tables = jnp.sort(optax.apply_updates(tables, updates), axis=1)
        return tables, moments, best, jnp.where(better, by_row, lowest)

    worst = jnp.full(rows.shape[0], jnp.inf)
    tables, _, best, lowest = jax.lax.fori_loop(0, steps, step, (start, optimizer.init(start), start, worst))
    last = loss(tables)[1] < lowest
    return jnp.where(last[:, None], tables, best) * reach
