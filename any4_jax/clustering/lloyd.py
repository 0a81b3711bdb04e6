"""Lloyd's iteration on a sorted row: clusters are intervals, so a step costs O(k log P), not O(k P)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from any4_jax.clustering.intervals import Intervals, weight_and_mean


class _State(NamedTuple):
    centroids: jax.Array  # [k], ascending
    steps: jax.Array  # int32, steps so far, relocations included
    running: jax.Array  # bool


def _last_indices(x: jax.Array, centroids: jax.Array) -> jax.Array:
    """Index of the last value nearest to each centroid but the last (ties to the lower): int32 [k - 1]."""
    low, high = centroids[:-1], centroids[1:]
    middle = low + (high - low) * 0.5
    return jnp.searchsorted(x, middle, side="right").astype(jnp.int32) - 1


def _means(table: Intervals, centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean of each cluster (the old centroid where it has no weight) and whether it has weight: [k] each."""
    last = jnp.append(_last_indices(table.x, centroids), table.x.shape[0] - 1)
    weight, mean = weight_and_mean(table, jnp.append(0, last[:-1] + 1), last)
    return jnp.where(weight > 0, mean, centroids), weight > 0


def _worst(table: Intervals, centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Value with the largest weighted squared error, and that error."""
    distance = jnp.min(jnp.abs(table.x - centroids[:, None]), 0)
    error = table.w * distance * distance
    worst = jnp.argmax(error)
    return table.x[worst], error[worst]


def lloyd_centroids(table: Intervals, start: jax.Array, max_iter: int, tol: jax.Array) -> jax.Array:
    """Centroids [k] float32, ascending, after Lloyd's steps from `start` [k].

    The steps end when the centroids' squared shift is at most tol * the row's weighted variance, or after max_iter
    of them. A cluster without weight is then moved to the value with the largest weighted error, and the steps go on,
    so that no cluster stays empty while some value has an error.
    """
    limit = tol * table.head[2, -1] / table.head[0, -1]

    def step(state: _State) -> _State:
        centroids, _ = _means(table, state.centroids)
        shift = centroids - state.centroids
        # Added in one fixed order, so that the number of rows solved together changes no bit.
        moved = jax.lax.associative_scan(jnp.add, jnp.maximum(shift * shift, 0.0))[-1]
        return _State(centroids, state.steps + 1, (moved > limit) & (state.steps + 1 < max_iter))

    def settle_and_fill(state: _State) -> _State:
        centroids, steps, _ = jax.lax.while_loop(lambda s: s.running, step, state)
        _, filled = _means(table, centroids)
        value, error = _worst(table, centroids)
        wanted = ~jnp.all(filled) & (error > 0) & (steps < max_iter)
        moved = jnp.sort(centroids.at[jnp.argmin(filled)].set(value))
        return _State(jnp.where(wanted, moved, centroids), steps, wanted)

    first = _State(start, jnp.int32(0), jnp.bool_(True))
    centroids = jax.lax.while_loop(lambda s: s.running, settle_and_fill, first).centroids
    # Rounding may put two neighbouring means out of order by one unit in the last place.
    return jnp.sort(centroids)
