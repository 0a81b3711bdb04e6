"""The mathematics of attention, shared by all caches.

Letters: B rows of the batch, T queries, S slots, H query heads, Hkv key/value heads, G = H / Hkv, D head size.
`kv_cache.base` defines slots and positions.

`attention` takes keys and values as arrays; `attention_by_blocks` reads one block of slots at a time.
"""

import jax
import jax.numpy as jnp

from any4_jax.kv_cache.blocks import (
    BLOCK_QUERIES,
    Part,
    ReadBlock,
    attention_over,
    heads_of,
    rounded_weights,
    rows_of,
    scores_of,
    within,
)
from any4_jax.kv_cache.settings import PLAIN, AttentionSettings

# The most scores (B * H * T * S) that `attention` holds at once, 64 MiB in float32; with more it goes block by block.
MAX_SCORES = 2**24
# The fastest size for D = 64, measured on two CPU cores; for D = 128, blocks of half the size take a third less time.
BLOCK_SLOTS = 512


def attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    start: jax.Array,
    settings: AttentionSettings = PLAIN,
    *,
    weight_bits: int | None = None,
) -> jax.Array:
    """Causal attention over arrays of keys and values; it goes block by block if there are more than MAX_SCORES scores.

    Args:
        queries: [B, T, H, D], rotated; H is a multiple of Hkv.
        keys: [B * Hkv, D, S], rotated, of any float dtype.
        values: [B * Hkv, S, D], of any float dtype.
        positions: int32 [B, T], of the queries.
        start: int32 [B], the first slot of each row that holds no padding.
        settings: scale, softcap and window.
        weight_bits: rounds the weights of each query to this many bits, from 0 to its largest; None leaves them.

    Returns:
        [B, T, H, D] in the queries' dtype; the softmax is computed in float32. Rows of padding are finite but
        meaningless.
    """
    batch, tokens, heads, _ = queries.shape
    slots = keys.shape[-1]
    if not fits(batch, tokens, heads, slots):
        read = slices(keys, values, BLOCK_SLOTS)
        return attention_by_blocks(queries, read, slots, positions, start, settings, weight_bits=weight_bits)
    rows = rows_of(queries, keys.shape[0] // batch)
    seen = within(jnp.arange(slots, dtype=jnp.int32), *_range(positions, start, settings))
    scores = scores_of(rows, keys, seen, settings)
    mixing = jax.nn.softmax(scores)
    mixing = rounded_weights(mixing, mixing.max(axis=-1, keepdims=True), weight_bits)
    mixing = mixing.astype(queries.dtype).reshape(*rows.shape[:2], slots)
    mixed = jnp.einsum("brs,bsd->brd", mixing, values.astype(queries.dtype))
    return heads_of(mixed, queries.shape)


def fits(batch: int, tokens: int, heads: int, slots: int) -> bool:
    """Whether `attention` holds the scores of B rows, T tokens, H heads and S slots at once."""
    # The scores of one token take less memory than the keys.
    return tokens == 1 or batch * heads * tokens * slots <= MAX_SCORES


def attention_by_blocks(
    queries: jax.Array,
    read: ReadBlock,
    slots: int,
    positions: jax.Array,
    start: jax.Array,
    settings: AttentionSettings = PLAIN,
    *,
    block_queries: int = BLOCK_QUERIES,
    weight_bits: int | None = None,
) -> jax.Array:
    """`attention` over blocks of slots, equal to it within float32 rounding.

    Only one block of scores, keys and values exists at a time (arXiv:2112.05682, with the running softmax of
    arXiv:2205.14135, algorithm 1), so a quantized cache can decode its slots block by block. Blocks that no query sees
    are not read. The gradient recomputes the scores. To round the weights takes the scores twice: what the largest
    weight of a query is, is known at the end.

    Args:
        queries, positions, start, settings, weight_bits: as for `attention`.
        read: reads one block. `first` is a multiple of the block's size; but if `slots` is not, the last block starts
            earlier, so that it ends with the last slot.
        slots: S.
        block_queries: how many of the T queries are processed together.

    Returns:
        The same as `attention`.

    Raises:
        ValueError: a block is larger than `slots`.
    """
    part = Part(read, slots, *_range(positions, start, settings))
    return attention_over(queries, [part], settings, block_queries=block_queries, weight_bits=weight_bits)


def slices(keys: jax.Array, values: jax.Array, block: int) -> ReadBlock:
    """A `ReadBlock` of keys [B * Hkv, D, S] and values [B * Hkv, S, D]; a block has min(`block`, S) slots."""
    block = min(block, keys.shape[-1])

    def read(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (
            jax.lax.dynamic_slice_in_dim(keys, first, block, 2),
            jax.lax.dynamic_slice_in_dim(values, first, block, 1),
        )

    return read


def _range(positions: jax.Array, start: jax.Array, settings: AttentionSettings) -> tuple[jax.Array, jax.Array]:
    """The first and the last slot that each query sees, int32 [B, T]."""
    newest = positions + start[:, None]
    first = jnp.broadcast_to(start[:, None], newest.shape)
    return first if settings.window is None else jnp.maximum(first, newest - settings.window + 1), newest
