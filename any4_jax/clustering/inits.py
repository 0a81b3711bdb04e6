"""First centroids for Lloyd's iteration: functions of a sorted row x [P], weights w [P], k and numbers.

Weights are non-negative and not all zero; values without weight (padding among them) are never drawn. Each function
returns float32 [k], ascending. The numbers, random or not, are the same for every row, so that a row's result does not
depend on its place; numpy makes them, because its generator needs no compilation.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.formats import NF4_LEVELS


def running_sum(values: jax.Array) -> jax.Array:
    """Inclusive sums along the last axis by doubling: one fixed order whatever the number of rows."""
    length = values.shape[-1]
    front = [(0, 0)] * (values.ndim - 1) + [(length, 0)]

    # A loop in the program: XLA would fuse unrolled doublings and recompute each in the next.
    def double(power: jax.Array, sums: jax.Array) -> jax.Array:
        start = length - (1 << power)
        return sums + jax.lax.dynamic_slice_in_dim(jnp.pad(sums, front), start, length, axis=-1)

    return jax.lax.fori_loop(0, (length - 1).bit_length(), double, values)


def _at_mass(mass: jax.Array, fraction: jax.Array) -> jax.Array:
    """Index of the first value whose running mass exceeds each fraction of the total: int32."""
    index = jnp.sum((mass <= fraction[..., None] * mass[-1]).astype(jnp.int32), -1)
    # A target that rounding put at the total itself belongs to the last value that has mass.
    return jnp.minimum(index, jnp.sum((mass < mass[-1]).astype(jnp.int32)))


def _plus_plus(x: jax.Array, w: jax.Array, k: int, draws: jax.Array) -> jax.Array:
    """Greedy k-means++ (Arthur and Vassilvitskii, 2007): each centroid is the best of 2 + ln k draws by w * d^2."""
    first = x[_at_mass(running_sum(w), draws[0, :1])]

    def add(squared: jax.Array, fraction: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen = x[_at_mass(running_sum(jnp.maximum(w * squared, 0.0)), fraction)]
        reduced = jnp.minimum(squared, (x - chosen[:, None]) ** 2)
        best = jnp.argmin(running_sum(jnp.maximum(w * reduced, 0.0))[:, -1])
        return reduced[best], chosen[best]

    _, others = jax.lax.scan(add, (x - first) ** 2, draws[1:])
    return jnp.sort(jnp.concatenate([first, others]))


def _random(x: jax.Array, w: jax.Array, k: int, draws: jax.Array) -> jax.Array:
    """k values drawn without replacement in proportion to w (those with the smallest exponentials / w)."""
    arrival = draws / w
    _, chosen = jax.lax.top_k(-arrival, min(k, x.size))
    found = x[chosen]
    return jnp.sort(jnp.concatenate([found, jnp.full((k - found.size,), found[0])]))


def _spread(x: jax.Array, w: jax.Array, k: int, places: jax.Array) -> jax.Array:
    """Levels at the given places between the row's minimum (0) and its maximum (1)."""
    # The maximum keeps the product from joining the sum as a fused multiply-add, which depends on the chunk.
    return x[0] + jnp.maximum((x[-1] - x[0]) * places, 0.0)


def _quantile(x: jax.Array, w: jax.Array, k: int, fractions: jax.Array) -> jax.Array:
    """The values at which the row's running weight passes the given fractions."""
    return x[_at_mass(running_sum(w), fractions)]


def numbers(init: str, length: int, k: int, seed: int) -> np.ndarray:
    """The float32 numbers that the start named `init` takes, for rows padded to `length` values: random ones for
    "kmeans++" and "random", places or fractions for the others."""
    rng = np.random.default_rng(seed)
    if init == "kmeans++":
        return rng.random((k, 2 + int(math.log(k))), np.float32)
    if init == "random":
        return rng.standard_exponential(length, np.float32)
    if init == "quantile":
        # The middles of k equal shares.
        return (np.arange(k, dtype=np.float32) + np.float32(0.5)) / np.float32(k)
    places = (np.array(NF4_LEVELS) + 1) / 2 if init == "nf4" else np.arange(k) / max(k - 1, 1)
    return places.astype(np.float32)


INITS: dict[str, Callable[..., jax.Array]] = {
    "kmeans++": _plus_plus,
    "random": _random,
    "int": _spread,
    "nf4": _spread,
    "quantile": _quantile,
}
