"""Sums of binary planes for tests, and what their products have to be."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from float64 import Terms

from any4_jax import weights
from any4_jax.weights import Sum


def planes(n: int, k: int, *, g: int, count: int = 3, table: Any = ((-1.0, 1.0),), offsets: bool = False) -> Sum:
    """Random planes whose scales are powers of two; `table` is [1, 2], or None for a table of its own for each row."""
    rng = np.random.default_rng(n + k)
    groups = -(-k // g)
    made = [
        weights.from_codes(
            jnp.asarray(rng.integers(0, 2, (n, k), dtype=np.uint8)),
            jnp.asarray(rng.normal(size=(n, 2)) if table is None else table, jnp.bfloat16),
            jnp.asarray(2.0 ** rng.integers(-3, 4, (n, groups)), jnp.bfloat16),
            jnp.asarray(rng.normal(size=(n, groups)), jnp.bfloat16) if offsets else None,
            bits=1,
            group_size=g,
            uniform=True,
        )
        for _ in range(count)
    ]
    return Sum(tuple(made))


def rows(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(7).normal(size=shape), dtype)


def check(y: jax.Array, x: jax.Array, w: Sum) -> None:
    """Within the rounding of the dtype and of float32 sums, relative to the terms of the sum in float64."""
    terms, x64 = [Terms.of(plane) for plane in w.terms], np.asarray(x, np.float64)
    dense = sum(t.scaled + t.shift for t in terms)
    magnitude = sum(np.abs(t.scaled) + np.abs(t.shift) for t in terms)
    slack = 16 * 2.0**-24 * (np.abs(x64) @ magnitude.T)
    unit = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 0.0}[str(y.dtype)]
    assert y.dtype == x.dtype
    np.testing.assert_array_less(
        np.abs(np.asarray(y, np.float64) - x64 @ dense.T), slack + unit * np.abs(x64 @ dense.T)
    )
