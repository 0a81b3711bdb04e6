"""The triangular factor of a Hessian, in which GPTQ works (arXiv 2210.17323)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Factor(NamedTuple):
    """A Hessian for a sequence of columns.

    Attributes:
      upper: U, float32 [K, K], upper triangular with ones on the diagonal.
      pivots: the diagonal of R, float32 [K].
      positive: whether the Hessian is positive definite, bool [].
    """

    upper: jax.Array
    pivots: jax.Array
    positive: jax.Array


def damped(hessian: jax.Array, damping: float | jax.Array) -> jax.Array:
    """A Hessian float32 [K, K] with `damping` times the mean of its diagonal added to the diagonal.

    Inputs that were always zero don't count in the mean, and get the mean itself.
    """
    diagonal = jnp.diagonal(hessian)
    alive = diagonal > 0
    mean = diagonal.sum() / jnp.maximum(alive.sum(), 1).astype(jnp.float32)
    mean = jnp.where(mean > 0, mean, 1.0)
    on_diagonal = jnp.eye(hessian.shape[0], dtype=bool)
    return jnp.where(on_diagonal, jnp.where(alive, diagonal + damping * mean, mean), hessian)


def factor(hessian: jax.Array, order: jax.Array) -> Factor:
    """Factors a Hessian float32 [K, K], which is `damped` already, for the columns taken in the order int32 [K].

    The rows and columns of U of inputs that were always zero are those of the identity, so no error passes to or from
    their weights.
    """
    ordered = hessian[order][:, order]
    # The Cholesky factor of the matrix with both axes reversed is R reversed.
    reverse = jnp.linalg.cholesky(ordered[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]
    pivots = jnp.diagonal(reverse)
    # A pivot below the rounding error of its sum is noise: exact arithmetic would give zero, or less.
    positive = (jnp.square(pivots) > jnp.finfo(jnp.float32).eps * jnp.diagonal(ordered)).all()
    return Factor(jnp.triu(reverse / pivots), pivots, positive)


def solve(factored: Factor, rows: jax.Array) -> jax.Array:
    """X with X H = rows, both float32 [N, K] with columns in the sequence of the factor of H."""
    upper = factored.upper
    inner = jax.scipy.linalg.solve_triangular(upper, rows.T, lower=False, unit_diagonal=True)
    inner = inner / jnp.square(factored.pivots)[:, None]
    return jax.scipy.linalg.solve_triangular(upper, inner, trans=1, lower=False, unit_diagonal=True).T
