"""Coordinate descent of codes under a Hessian (CDQuant, arXiv 2406.17542).

With all other codes of a row fixed, the error (w - q) H (w - q)^T is least in column k at q_k + ((w - q) H)_k / H_kk,
and the code nearest to this is the best one. A sweep does this for each column in turn.

Matrices are [K, R] inside, so that a column of weights lies in one piece.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from any4_jax import formats, scaling
from any4_jax.refit.normal_equations import HIGHEST


class Grid(NamedTuple):
    """The values that weights may take, float32: tables [R, 2**bits], scales and offsets (or None) [R, ceil(K/G)]."""

    table: jax.Array
    scales: jax.Array
    offsets: jax.Array | None

    def levels(self, codes: jax.Array) -> jax.Array:
        """The table's entry of each code, float32 [R, K]."""
        return jnp.take_along_axis(self.table, codes.astype(jnp.int32), axis=1)

    def values(self, codes: jax.Array, group_size: int) -> jax.Array:
        """The value of each code, float32 [R, K]."""
        k = codes.shape[1]
        found = self.levels(codes) * scaling.expand(self.scales, group_size, k)
        return found if self.offsets is None else found + scaling.expand(self.offsets, group_size, k)


def descend(
    target: jax.Array,
    hessian: jax.Array,
    grid: Grid,
    codes: jax.Array,
    pull: jax.Array,
    group_size: int,
    *,
    sweeps: int | jax.Array,
    uniform: bool,
    block: int = 128,
) -> jax.Array:
    """Codes after some sweeps over the columns. No step raises a row's error, beyond rounding.

    Args:
      target: w, float32 [R, K].
      hessian: H, float32 [K, K], with a positive diagonal.
      grid: what codes stand for.
      codes: the codes to start from, uint8 [R, K].
      pull: (w - q) H for these codes, float32 [R, K].
      group_size: G.
      sweeps: how often each column is visited, an int or int32 [].
      uniform: whether tables are arithmetic ramps, see `formats.nearest`.
      block: columns that are worked on between two products with all columns. It changes nothing beyond rounding.

    Returns:
      uint8 [R, K]. A code changes only where the error falls.
    """
    k = target.shape[1]
    block = min(block, k)
    blocks = -(-k // block)
    target, scales = target.T, grid.scales.T
    offsets = None if grid.offsets is None else grid.offsets.T

    def work_on_block(index, state):
        # The last block ends with the row. It visits some columns once more, which does no harm.
        start = jnp.minimum(index % blocks * block, k - block)
        codes, values, pull = state
        rows = jax.lax.dynamic_slice_in_dim(hessian, start, block)
        corner = jax.lax.dynamic_slice_in_dim(rows, start, block, axis=1)
        old, pulled = (jax.lax.dynamic_slice_in_dim(a, start, block) for a in (values, pull))

        def column(i, within):
            codes, moved = within
            now = old[i]
            best = now + (pulled[i] - jnp.matmul(corner[i], moved, precision=HIGHEST)) / corner[i, i]
            group = (start + i) // group_size
            scale, offset = scales[group][:, None], None if offsets is None else offsets[group][:, None]
            code = formats.nearest(scaling.normalize(best[:, None], scale, offset, 1), grid.table, uniform=uniform)
            value = Grid(grid.table, scale, offset).values(code, 1)[:, 0]
            better = jnp.abs(best - value) < jnp.abs(best - now)
            kept = jnp.where(better, code[:, 0], codes[i])
            return codes.at[i].set(kept), moved.at[i].set(jnp.where(better, value - now, 0.0))

        mine = jax.lax.dynamic_slice_in_dim(codes, start, block)
        mine, moved = jax.lax.fori_loop(0, block, column, (mine, jnp.zeros_like(old)))
        change = jax.lax.dot_general(rows, moved, (((0,), (0,)), ((), ())), precision=HIGHEST)
        codes = jax.lax.dynamic_update_slice_in_dim(codes, mine, start, axis=0)
        values = jax.lax.dynamic_update_slice_in_dim(values, old + moved, start, axis=0)
        return codes, values, pull - change

    state = codes.T, grid.values(codes, group_size).T, pull.T
    return jax.lax.fori_loop(0, sweeps * blocks, work_on_block, state)[0].T
