"""The mathematics of attention, shared by all caches.

Letters: B rows of the batch, T queries, S slots, H query heads, Hkv key/value heads, G = H / Hkv, D head size.
`kv_cache.base` defines slots and positions.

`attention` takes keys and values as arrays; `attention_by_blocks` reads one block of slots at a time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from any4_jax.kv_cache.settings import PLAIN, AttentionSettings

# The most scores (B * H * T * S) that `attention` holds at once, 64 MiB in float32; with more it goes block by block.
MAX_SCORES = 2**24
# The fastest sizes for D = 64, measured on two CPU cores; for D = 128, blocks of half the size take a third less time.
BLOCK_QUERIES = 256
BLOCK_SLOTS = 512

# The score of a slot that the query doesn't see. It is finite so that a padding query, which sees no slot, averages
# over some slots instead of dividing zero by zero.
MASKED = float(jnp.finfo(jnp.float32).min) / 2

ReadBlock = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""`read(first)` returns keys [B * Hkv, D, block] and values [B * Hkv, block, D] of slots first..first + block - 1.

`first` is a traced int32 scalar; every call returns the same shapes.
"""


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
    rows = _rows(queries, keys.shape[0] // batch)
    scores = _scores(rows, keys, _seen(jnp.arange(slots, dtype=jnp.int32), positions, start, settings), settings)
    mixing = jax.nn.softmax(scores)
    mixing = _rounded(mixing, mixing.max(axis=-1, keepdims=True), weight_bits)
    mixing = mixing.astype(queries.dtype).reshape(*rows.shape[:2], slots)
    mixed = jnp.einsum("brs,bsd->brd", mixing, values.astype(queries.dtype))
    return _heads(mixed, queries.shape)


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
    batch, tokens = positions.shape
    pairs, _, block = jax.eval_shape(read, jax.ShapeDtypeStruct((), jnp.int32))[0].shape
    if block > slots:
        raise ValueError(f"a block holds {block} slots and the cache {slots}; read smaller blocks, or add slots")

    @jax.checkpoint
    def attend(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _running_softmax(*part, read, pairs // batch, block, slots, start, settings, weight_bits)

    if tokens <= block_queries:
        return attend((queries, positions))
    count = -(-tokens // block_queries)

    def split(x: jax.Array) -> jax.Array:
        # Copies of the last query pad the last block: they see no slot that the others don't.
        padding = [(0, 0), (0, count * block_queries - tokens)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding, mode="edge").reshape(batch, count, block_queries, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    mixed = jnp.moveaxis(jax.lax.map(attend, (split(queries), split(positions))), 0, 1)
    return mixed.reshape(batch, -1, *queries.shape[2:])[:, :tokens]


def slices(keys: jax.Array, values: jax.Array, block: int) -> ReadBlock:
    """A `ReadBlock` of keys [B * Hkv, D, S] and values [B * Hkv, S, D]; a block has min(`block`, S) slots."""
    block = min(block, keys.shape[-1])

    def read(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (
            jax.lax.dynamic_slice_in_dim(keys, first, block, 2),
            jax.lax.dynamic_slice_in_dim(values, first, block, 1),
        )

    return read


class _Running(NamedTuple):
    """The softmax over the slots so far; its sums are divided by exp(highest).

    Attributes:
        highest: float32 [B * Hkv, G * T], the highest score.
        total: float32 [B * Hkv, G * T], the sum of the weights.
        mixed: float32 [B * Hkv, G * T, D], the sum of the weighted values.
    """

    highest: jax.Array
    total: jax.Array
    mixed: jax.Array


def _running_softmax(
    queries: jax.Array,
    positions: jax.Array,
    read: ReadBlock,
    groups: int,
    block: int,
    slots: int,
    start: jax.Array,
    settings: AttentionSettings,
    weight_bits: int | None,
) -> jax.Array:
    """Attention for one block of queries, as a scan over blocks of `block` slots; `groups` is Hkv."""
    rows = _rows(queries, groups)
    own = positions + start[:, None]
    newest = own.max()
    oldest = jnp.int32(0) if settings.window is None else own.min() - settings.window + 1

    def scored(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = jnp.minimum(index * block, slots - block)
        keys, values = read(first)
        here = first + jnp.arange(block, dtype=jnp.int32)
        # The last block may overlap the one before it.
        seen = _seen(here, positions, start, settings) & (here >= index * block)[None, None]
        return _scores(rows, keys, seen, settings).reshape(*rows.shape[:2], block), values

    def highest(so_far: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.maximum(so_far, scored(index)[0].max(axis=-1))

    def add(running: _Running, index: jax.Array) -> _Running:
        scores, values = scored(index)
        highest = jnp.maximum(running.highest, scores.max(axis=-1))
        weights, fade = jnp.exp(scores - highest[..., None]), jnp.exp(running.highest - highest)
        new = jnp.einsum(
            "brs,bsd->brd",
            _rounded(weights, 1.0, weight_bits).astype(rows.dtype),
            values.astype(rows.dtype),
            preferred_element_type=jnp.float32,
        )
        total = running.total * fade + weights.sum(axis=-1)
        return _Running(highest, total, running.mixed * fade[..., None] + new)

    def over_blocks(body: Callable[[Any, jax.Array], Any], carry: Any) -> Any:
        # A scan with a conditional in each step: a loop over the needed blocks alone has no reverse-mode gradient.
        @jax.checkpoint
        def step(carry: Any, index: jax.Array) -> tuple[Any, None]:
            needed = (index * block <= newest) & ((index + 1) * block > oldest)
            return jax.lax.cond(needed, body, lambda carry, _: carry, carry, index), None

        return jax.lax.scan(step, carry, jnp.arange(-(-slots // block), dtype=jnp.int32))[0]

    nothing = jnp.zeros(rows.shape[:2], jnp.float32)
    lowest = nothing + MASKED
    # Where it starts from the highest score of all, the largest weight is 1 throughout.
    start_from = lowest if weight_bits is None else over_blocks(highest, lowest)
    running = over_blocks(add, _Running(start_from, nothing, jnp.zeros(rows.shape, jnp.float32)))
    # No total is 0: the newest query's own block is always read, and the highest score has weight 1.
    return _heads((running.mixed / running.total[..., None]).astype(queries.dtype), queries.shape)


def _rounded(weights: jax.Array, largest: jax.Array | float, bits: int | None) -> jax.Array:
    """Weights rounded to multiples of largest / (2^bits - 1); as they are if `bits` is None."""
    if bits is None:
        return weights
    steps = 2**bits - 1
    return jnp.round(weights * (steps / largest)) * (largest / steps)


def _rows(queries: jax.Array, groups: int) -> jax.Array:
    """Queries [B, T, H, D] -> [B * Hkv, G * T, D]: all queries that share keys become rows of one product."""
    batch, tokens, heads, size = queries.shape
    rows = queries.reshape(batch, tokens, groups, heads // groups, size)
    return rows.transpose(0, 2, 3, 1, 4).reshape(batch * groups, -1, size)


def _heads(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_rows`: [B * Hkv, G * T, D] -> [B, T, H, D], which is `shape`."""
    batch, tokens, _, size = shape
    groups = rows.shape[0] // batch
    return rows.reshape(batch, groups, -1, tokens, size).transpose(0, 3, 1, 2, 4).reshape(shape)


def _seen(slots: jax.Array, positions: jax.Array, start: jax.Array, settings: AttentionSettings) -> jax.Array:
    """Which of the slots, int32 [S], each query sees: bool [B, T, S]."""
    own, slots = (positions + start[:, None])[:, :, None], slots[None, None]
    seen = (slots >= start[:, None, None]) & (slots <= own)
    return seen if settings.window is None else seen & (slots > own - settings.window)


def _scores(rows: jax.Array, keys: jax.Array, seen: jax.Array, settings: AttentionSettings) -> jax.Array:
    """Rows [B * Hkv, G * T, D], keys [B * Hkv, D, S], seen [B, T, S] -> float32 scores [B, Hkv, G, T, S]."""
    batch, tokens, slots = seen.shape
    scores = jnp.einsum("brd,bds->brs", rows, keys.astype(rows.dtype), preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, rows.shape[0] // batch, -1, tokens, slots)
    scores = scores * (rows.shape[-1] ** -0.5 if settings.scale is None else settings.scale)
    if settings.softcap is not None:
        scores = settings.softcap * jnp.tanh(scores / settings.softcap)
    return jnp.where(seen[:, None, None], scores, MASKED)
