"""What the weights of a layer are like: their moments, their range, and how many bits their values and codes carry."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.weights import QuantizedTensor

BINS = 256


@dataclasses.dataclass(frozen=True)
class WeightStats:
    """Weights [*L, N, K].

    Attributes:
      shape: (*L, N, K).
      mean, std, low, high: over all of them.
      kurtosis: E[(w - mean)^4] / std^4 - 3: 0 for normal weights, larger where a few are far out; NaN of equal ones.
      entropy: in bits, of the histogram of 256 equal bins from `low` to `high`: 8 where all are as full.
    """

    shape: tuple[int, ...]
    mean: float
    std: float
    low: float
    high: float
    kurtosis: float
    entropy: float

    @classmethod
    def of(cls, w: jax.Array) -> "WeightStats":
        """See the class; w is [*L, N, K] of any float dtype."""
        rows = w.reshape(-1, w.shape[-1])
        found = [np.asarray(each, np.float64) for each in _sums(rows)]
        mean = found[0].sum() / w.size
        powers, low, high, counts = _around(rows, jnp.float32(mean), found[1].min(), found[2].max())
        second, fourth = np.asarray(powers, np.float64).sum(axis=1) / w.size
        kurtosis = fourth / second**2 - 3 if second else math.nan
        return cls(
            tuple(w.shape), float(mean), math.sqrt(second), float(low), float(high), float(kurtosis), entropy(counts)
        )


def code_entropy(operator: Any) -> float:
    """The bits that the codes of an operator carry, at most as many as they have; NaN if it isn't one table-coded
    matrix or stack, of an input that may be scaled, permuted or rounded."""
    while not isinstance(operator, QuantizedTensor):
        if not hasattr(operator, "inner"):
            return math.nan
        operator = operator.inner
    return entropy(_counted(operator))


def entropy(counts: Any) -> float:
    """The entropy in bits of a histogram, by its counts."""
    share = np.asarray(counts, np.float64)
    share = share[share > 0] / share.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0


@jax.jit
def _sums(rows: jax.Array) -> tuple[jax.Array, ...]:
    rows = rows.astype(jnp.float32)
    return rows.sum(axis=1), rows.min(axis=1), rows.max(axis=1)


@jax.jit
def _around(rows: jax.Array, mean: jax.Array, low: jax.Array, high: jax.Array) -> tuple[jax.Array, ...]:
    """The sums of the second and the fourth power of w - mean [2, N], both ends, and the counts of the BINS."""
    rows = rows.astype(jnp.float32)
    squares = jnp.square(rows - mean)
    width = jnp.where(high > low, (high - low) / BINS, 1.0)
    places = jnp.clip(jnp.floor((rows - low) / width), 0, BINS - 1).astype(jnp.int32)
    counts = jnp.zeros(BINS, jnp.int32).at[places.reshape(-1)].add(1)
    return jnp.stack([squares.sum(axis=1), jnp.square(squares).sum(axis=1)]), low, high, counts


@jax.jit
def _counted(leaf: QuantizedTensor) -> jax.Array:
    codes = leaf.unpacked_codes().reshape(-1)
    return jnp.zeros(2**leaf.bits, jnp.int32).at[codes].add(1)
