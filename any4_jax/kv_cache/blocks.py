"""Attention as a running softmax over blocks of slots: only one block of scores, keys and values exists at a time.

Letters as in `kv_cache.attention`. Slots may come in several parts, such as quantized ones and exact ones: each has
numbers of its own for its slots, and each query sees a range of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from any4_jax.kv_cache.settings import PLAIN, AttentionSettings

# The fastest size for D = 64, measured on two CPU cores.
BLOCK_QUERIES = 256

# The score of a slot that the query doesn't see. It is finite so that a padding query, which sees no slot, averages
# over some slots instead of dividing zero by zero.
MASKED = float(jnp.finfo(jnp.float32).min) / 2

ReadBlock = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""`read(first)` returns keys [B * Hkv, D, block] and values [B * Hkv, block, D] of slots first..first + block - 1.

`first` is a traced int32 scalar; every call returns the same shapes.
"""


class Part(NamedTuple):
    """Slots that queries see a range of.

    Attributes:
        read: reads one block. `first` is a multiple of the block's size; but if `slots` is not, the last block starts
            earlier, so that it ends with the last slot.
        slots: S, of this part.
        oldest, newest: int32 [B, T], the first and the last slot that each query sees; none if the first is higher.
    """

    read: ReadBlock
    slots: int
    oldest: jax.Array
    newest: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        """B * Hkv, and the slots in a block."""
        keys, _ = jax.eval_shape(self.read, jax.ShapeDtypeStruct((), jnp.int32))
        return keys.shape[0], keys.shape[-1]


def attention_over(
    queries: jax.Array,
    parts: Sequence[Part],
    settings: AttentionSettings = PLAIN,
    *,
    block_queries: int = BLOCK_QUERIES,
    weight_bits: int | None = None,
) -> jax.Array:
    """Attention of each query over the slots that it sees, in all parts together; see `attention_by_blocks`.

    Args:
        queries: [B, T, H, D], rotated; H is a multiple of Hkv.
        parts: at least one.
        settings: scale and softcap. The window is a matter of what each query sees.
        block_queries, weight_bits: as for `attention_by_blocks`.

    Returns:
        [B, T, H, D] in the queries' dtype; zeros, or an average of some slots, for a query that sees none.

    Raises:
        ValueError: a block is larger than its part.
    """
    batch, tokens = parts[0].oldest.shape
    shapes = [part.shape for part in parts]
    for part, (_, block) in zip(parts, shapes, strict=True):
        if block > part.slots:
            raise ValueError(
                f"a block holds {block} slots and the cache {part.slots}; read smaller blocks, or add slots"
            )

    @jax.checkpoint
    def attend(some: tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]) -> jax.Array:
        rows = rows_of(some[0], shapes[0][0] // batch)
        blocks = [
            _Blocks(part.read, part.slots, block, rows, *seen, settings)
            for part, (_, block), seen in zip(parts, shapes, some[1], strict=True)
        ]
        return heads_of(_running_softmax(rows, blocks, weight_bits).astype(queries.dtype), some[0].shape)

    whole = queries, [(part.oldest, part.newest) for part in parts]
    if tokens <= block_queries:
        return attend(whole)
    count = -(-tokens // block_queries)

    def split(x: jax.Array) -> jax.Array:
        # Copies of the last query pad the last block: they see no slot that the others don't.
        padding = [(0, 0), (0, count * block_queries - tokens)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding, mode="edge").reshape(batch, count, block_queries, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    mixed = jnp.moveaxis(jax.lax.map(attend, jax.tree.map(split, whole)), 0, 1)
    return mixed.reshape(batch, -1, *queries.shape[2:])[:, :tokens]


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


class _Blocks(NamedTuple):
    """The blocks of one part, for one block of queries.

    Attributes:
        read, slots, oldest, newest: of the part.
        block: the slots of a block.
        rows: [B * Hkv, G * T, D], the queries.
        settings: scale and softcap.
    """

    read: ReadBlock
    slots: int
    block: int
    rows: jax.Array
    oldest: jax.Array
    newest: jax.Array
    settings: AttentionSettings

    def scored(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scores [B * Hkv, G * T, block] of the block `index`, and its values."""
        first = jnp.minimum(index * self.block, self.slots - self.block)
        keys, values = self.read(first)
        here = first + jnp.arange(self.block, dtype=jnp.int32)
        # The last block may overlap the one before it.
        seen = within(here, self.oldest, self.newest) & (here >= index * self.block)[None, None]
        return scores_of(self.rows, keys, seen, self.settings).reshape(*self.rows.shape[:2], self.block), values

    def fold(self, body: Callable[[Any, jax.Array, jax.Array], Any], carry: Any) -> Any:
        """`body(carry, scores, values)` for one block after another, without those that no query sees if there are
        several."""
        count = -(-self.slots // self.block)
        if count == 1:
            return body(carry, *self.scored(jnp.int32(0)))
        sees = self.oldest <= self.newest
        oldest = jnp.where(sees, self.oldest, self.slots).min()
        newest = jnp.where(sees, self.newest, -1).max()

        def read(carry: Any, index: jax.Array) -> Any:
            return body(carry, *self.scored(index))

        # A scan with a conditional in each step: a loop over the needed blocks alone has no reverse-mode gradient.
        @jax.checkpoint
        def step(carry: Any, index: jax.Array) -> tuple[Any, None]:
            needed = (index * self.block <= newest) & ((index + 1) * self.block > oldest)
            return jax.lax.cond(needed, read, lambda carry, _: carry, carry, index), None

        return jax.lax.scan(step, carry, jnp.arange(count, dtype=jnp.int32))[0]


def _running_softmax(rows: jax.Array, parts: Sequence[_Blocks], weight_bits: int | None) -> jax.Array:
    """Attention of rows [B * Hkv, G * T, D], float32 of that shape."""

    def highest(so_far: jax.Array, scores: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.maximum(so_far, scores.max(axis=-1))

    def add(running: _Running, scores: jax.Array, values: jax.Array) -> _Running:
        highest = jnp.maximum(running.highest, scores.max(axis=-1))
        weights, fade = jnp.exp(scores - highest[..., None]), jnp.exp(running.highest - highest)
        new = jnp.einsum(
            "brs,bsd->brd",
            rounded_weights(weights, 1.0, weight_bits).astype(rows.dtype),
            values.astype(rows.dtype),
            preferred_element_type=jnp.float32,
        )
        total = running.total * fade + weights.sum(axis=-1)
        return _Running(highest, total, running.mixed * fade[..., None] + new)

    nothing = jnp.zeros(rows.shape[:2], jnp.float32)
    start_from = nothing + MASKED
    if weight_bits is not None:
        # Where it starts from the highest score of all, the largest weight is 1 throughout.
        for part in parts:
            start_from = part.fold(highest, start_from)
    running = _Running(start_from, nothing, jnp.zeros(rows.shape, jnp.float32))
    for part in parts:
        running = part.fold(add, running)
    # A total is 0 only if no block was read, since the highest score has weight 1.
    return running.mixed / jnp.where(running.total == 0, 1.0, running.total)[..., None]


def rounded_weights(weights: jax.Array, largest: jax.Array | float, bits: int | None) -> jax.Array:
    """Weights rounded to multiples of largest / (2^bits - 1); as they are if `bits` is None."""
    if bits is None:
        return weights
    steps = 2**bits - 1
    return jnp.round(weights * (steps / largest)) * (largest / steps)


def rows_of(queries: jax.Array, groups: int) -> jax.Array:
    """Queries [B, T, H, D] -> [B * Hkv, G * T, D]: all queries that share keys become rows of one product."""
    batch, tokens, heads, size = queries.shape
    rows = queries.reshape(batch, tokens, groups, heads // groups, size)
    return rows.transpose(0, 2, 3, 1, 4).reshape(batch * groups, -1, size)


def heads_of(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_rows`: [B * Hkv, G * T, D] -> [B, T, H, D], which is `shape`."""
    batch, tokens, _, size = shape
    groups = rows.shape[0] // batch
    return rows.reshape(batch, groups, -1, tokens, size).transpose(0, 3, 1, 2, 4).reshape(shape)


def within(slots: jax.Array, oldest: jax.Array, newest: jax.Array) -> jax.Array:
    """Which of the slots, int32 [S], are in each query's range, int32 [B, T]: bool [B, T, S]."""
    slots = slots[None, None]
    return (slots >= oldest[:, :, None]) & (slots <= newest[:, :, None])


def scores_of(rows: jax.Array, keys: jax.Array, seen: jax.Array, settings: AttentionSettings) -> jax.Array:
    """Rows [B * Hkv, G * T, D], keys [B * Hkv, D, S], seen [B, T, S] -> float32 scores [B, Hkv, G, T, S]."""
    batch, tokens, slots = seen.shape
    scores = jnp.einsum("brd,bds->brs", rows, keys.astype(rows.dtype), preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, rows.shape[0] // batch, -1, tokens, slots)
    scores = scores * (rows.shape[-1] ** -0.5 if settings.scale is None else settings.scale)
    if settings.softcap is not None:
        scores = settings.softcap * jnp.tanh(scores / settings.softcap)
    return jnp.where(seen[:, None, None], scores, MASKED)
