"""Slabs of a cache with a place for each position, to which tokens go once they are no longer among the newest R.

Letters as in `kv_cache.base`. Rows have positions of their own, so they are written one after another, in place.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from any4_jax.kv_cache.attention import BLOCK_SLOTS
from any4_jax.kv_cache.codes import Slab, update
from any4_jax.kv_cache.ring import Recent


def leaving(slab: Slab, recent: Recent, encode: Callable[[jax.Array], Slab]) -> Slab:
    """The slab with the tokens that leave the ring: all but the newest R.

    Args:
        slab: arrays [B, heads, P, ...], for P positions.
        recent: the ring, of R tokens or none, and what arrives.
        encode: numbers of one row [Hkv, N, D] -> arrays of the slab, [heads, N, ...].
    """
    batch, _, residual, _ = recent.ring.shape
    tokens, room = recent.new.shape[2], jax.tree.leaves(slab)[0].shape[2]
    piece = min(tokens, residual or BLOCK_SLOTS, room)

    def store(b: jax.Array, j: jax.Array, slab: Slab) -> Slab:
        arrival = recent.arrival.of_row(b)
        begin, end = (jnp.maximum(n - residual, 0) for n in (arrival.before, arrival.after))
        first = jnp.minimum(begin + j * piece, room - piece)
        positions = first + jnp.arange(piece, dtype=jnp.int32)
        due = ((positions >= begin) & (positions < end))[:, None]
        return update(slab, encode(recent.of_row(b, positions)), lambda size: (b, 0, first, 0), due)

    return each_piece(batch, -(-tokens // piece), store, slab)


def each_piece(rows: int, pieces: int, store: Callable[[jax.Array, jax.Array, Slab], Slab], slab: Slab) -> Slab:
    """`store(row, piece, slab)` for each piece of each row."""
    return _loop(rows, lambda b, slab: _loop(pieces, functools.partial(store, b), slab), slab)


def _loop(count: int, body: Callable[[jax.Array, Slab], Slab], slab: Slab) -> Slab:
    """A loop, or its body alone if it runs once."""
    return body(jnp.int32(0), slab) if count == 1 else jax.lax.fori_loop(0, count, body, slab)
