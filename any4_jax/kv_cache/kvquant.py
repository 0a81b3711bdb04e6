"""KVQuant (arXiv:2401.18079): learned levels for keys before their rotation and for values, and exact outliers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from any4_jax.kv_cache.attention import BLOCK_SLOTS
from any4_jax.kv_cache.base import Rope, rotated
from any4_jax.kv_cache.blocks import Part, ReadBlock, attention_over
from any4_jax.kv_cache.by_token import leaving
from any4_jax.kv_cache.kvquant_levels import CacheSample, learned
from any4_jax.kv_cache.nonuniform import Levels, TokenCodes, decode_keys, decode_values, encode_keys, encode_values
from any4_jax.kv_cache.plain import check_fits
from any4_jax.kv_cache.ring import Arrival, Recent, with_first
from any4_jax.kv_cache.settings import PLAIN, AttentionSettings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVQuantCache:
    """Keys and values of one block; `KVQuant` says how they are stored, `kv_cache.base` what the letters mean.

    A token is stored by its position, not by its slot: so a row of a ragged batch is stored as it would be alone. Keys
    are stored before their rotation.

    Attributes:
        levels: of the block.
        keys, values: codes of P positions, [B, ...]; the first n - R of a row's n tokens.
        first_keys, first_values: [B, Hkv, N, D], the first N tokens of each row.
        recent_keys, recent_values: [B, Hkv, R, D], the newest R tokens; see `kv_cache.ring`.
        length: int32 scalar, the slots in use.
        start: int32 [B], the first slot of each row that holds no padding.
        slots: S (static).
        block: how many positions are decoded at a time (static); P is a multiple of it.
        bits: of the codes (static).
    """

    levels: Levels
    keys: TokenCodes
    values: TokenCodes
    first_keys: jax.Array
    first_values: jax.Array
    recent_keys: jax.Array
    recent_values: jax.Array
    length: jax.Array
    start: jax.Array
    slots: int = dataclasses.field(metadata=dict(static=True))
    block: int = dataclasses.field(metadata=dict(static=True))
    bits: int = dataclasses.field(metadata=dict(static=True))

    def append(self, keys: jax.Array, values: jax.Array, positions: jax.Array, rope: Rope | None) -> Self:
        """Add keys and values [B, T, Hkv, D].

        Raises:
            ValueError: T exceeds the number of slots.
        """
        del positions, rope  # keys are rotated when they are read
        return self._with(*self._arriving(keys, values))

    def attend(
        self, queries: jax.Array, positions: jax.Array, rope: Rope | None, settings: AttentionSettings = PLAIN
    ) -> jax.Array:
        """Attention of queries [B, T, H, D] over what is quantized and what is exact for the newest token."""
        count = jnp.maximum(self.length - self.start, 0)
        # Nothing arrives, and the rings hold all that is exact.
        arrival = Arrival(count, count, jnp.zeros_like(count))
        recent = (Recent(ring, ring, arrival) for ring in (self.recent_keys, self.recent_values))
        reader = _Reader(self, *recent, rope, count - 1, 1)
        return reader.attend(queries, positions, (count - 1)[:, None], settings)

    def append_attend(
        self,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        positions: jax.Array,
        rope: Rope | None,
        settings: AttentionSettings = PLAIN,
    ) -> tuple[jax.Array, Self]:
        """`append`, then attention of the new tokens: each sees what it would see if they came one by one.

        Raises:
            ValueError: T exceeds the number of slots.
        """
        recent = self._arriving(keys, values)
        cache = self._with(*recent)
        reader = _Reader(cache, *recent, rope, recent[0].arrival.before, keys.shape[1])
        return reader.attend(queries, positions, positions, settings), cache

    def _arriving(self, keys: jax.Array, values: jax.Array) -> tuple[Recent, Recent]:
        check_fits(keys.shape[1], self.slots)
        arrival, dtype = Arrival.of(self.length, self.start, keys.shape[1]), self.recent_keys.dtype
        new = (x.transpose(0, 2, 1, 3).astype(dtype) for x in (keys, values))
        rings = self.recent_keys, self.recent_values
        first, second = (Recent(ring, x, arrival) for ring, x in zip(rings, new, strict=True))
        return first, second

    def _with(self, keys: Recent, values: Recent) -> Self:
        rest = self.levels, self.bits, self.keys.outliers.shape[-1]
        return dataclasses.replace(
            self,
            keys=leaving(self.keys, keys, lambda x: encode_keys(x, *rest)),
            values=leaving(self.values, values, lambda x: encode_values(x, *rest)),
            first_keys=with_first(self.first_keys, keys.new, keys.arrival),
            first_values=with_first(self.first_values, values.new, values.arrival),
            recent_keys=keys.turned(),
            recent_values=values.turned(),
            length=self.length + keys.new.shape[2],
        )


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Attention over a cache, and over the tokens that are exact to some queries.

    A query is *judged* at a position p, its own or that of another token of its row: what is quantized and what exact
    to it is what the token at p would have seen. The first N tokens are exact, and so are those from p - R + 1 on.

    Attributes:
        cache: it holds all tokens.
        keys, values: those that are exact to some query.
        rope: of the keys.
        earliest: int32 [B], the lowest p of each row.
        tokens: all positions are below `earliest` + `tokens`.
    """

    cache: KVQuantCache
    keys: Recent
    values: Recent
    rope: Rope | None
    earliest: jax.Array
    tokens: int

    def attend(
        self, queries: jax.Array, positions: jax.Array, judges: jax.Array, settings: AttentionSettings
    ) -> jax.Array:
        """Attention of queries [B, T, H, D]; `judges` is the p of each, int32 [B, T]."""
        cache, count, residual = self.cache, self.cache.first_keys.shape[2], self.keys.ring.shape[2]
        # Other caches take what broadcasts, and integers of 64 bits.
        positions, p = (jnp.broadcast_to(x, queries.shape[:2]).astype(jnp.int32) for x in (positions, judges))
        oldest = jnp.zeros_like(p) if settings.window is None else jnp.maximum(positions - settings.window + 1, 0)
        later, room = jnp.maximum(oldest, count), cache.keys.outliers.shape[2]
        parts = [Part(self._coded, room, later, jnp.minimum(positions, p - residual))]
        if count:
            parts.append(Part(self._first, count, oldest, jnp.minimum(positions, count - 1)))
        if residual:
            first = (self.earliest - residual + 1)[:, None]
            near, begin = residual - 1 + self.tokens, jnp.maximum(later, p - residual + 1)
            parts.append(Part(self._near(first, near), near, begin - first, positions - first))
        return attention_over(rotated(queries, positions, self.rope), parts, settings)

    def _coded(self, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Decodes a block."""
        cache = self.cache

        def part(codes: TokenCodes) -> TokenCodes:
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, cache.block, 2), codes)

        keys = decode_keys(part(cache.keys), cache.levels, cache.bits)
        values = decode_values(part(cache.values), cache.levels, cache.bits)
        return self._read(keys, values, (first + jnp.arange(cache.block, dtype=jnp.int32))[None])

    def _first(self, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first N tokens, in one block."""
        del first
        keys, values = self.cache.first_keys, self.cache.first_values
        return self._read(keys, values, jnp.arange(keys.shape[2], dtype=jnp.int32)[None])

    def _near(self, begin: jax.Array, slots: int) -> ReadBlock:
        """Up to BLOCK_SLOTS exact tokens of the `slots` at positions from begin int32 [B, 1] on."""
        block = min(slots, BLOCK_SLOTS)

        def read(first: jax.Array) -> tuple[jax.Array, jax.Array]:
            positions = begin + first + jnp.arange(block, dtype=jnp.int32)[None]
            return self._read(self.keys.at(positions), self.values.at(positions), positions)

        return read

    def _read(self, keys: jax.Array, values: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys [B * Hkv, D, N] and values [B * Hkv, N, D] from [B, Hkv, N, D] and positions [B or 1, N]."""
        positions = jnp.broadcast_to(positions, (keys.shape[0], keys.shape[2]))
        keys = rotated(keys.swapaxes(1, 2), positions, self.rope).transpose(0, 2, 3, 1)
        return keys.reshape(-1, *keys.shape[2:]), values.reshape(-1, *values.shape[2:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVQuant:
    """A cache factory: keys and values as codes of learned levels, with their outliers and the first tokens exact.

        cache = calibrate_cache(model, KVQuant(bits=3), text)
        generate(model, ..., cache=cache)

    Keys are quantized before their rotation, when each channel has a steady range: its scale and offset are learned.
    The range of values belongs to a token, and is that of all its channels but the outliers. Each block has one table
    of levels for keys and one for values. A token's outliers, those of its C = Hkv * D numbers that are farthest out of
    their range, are stored as they are in 2 (int(C * outliers / 2) + 1) slots: so shapes don't depend on the data. The
    first tokens, to which much attention goes, are exact, by their position in their row, and so are the newest.

    Attributes:
        bits: of each number; 4, 3 or 2.
        outliers: the share of a token's numbers that is kept exact, rounded up to one more at each end; 0 keeps none.
        sinks: how many of a row's first tokens are kept exact.
        recent: how many of the newest tokens are kept exact, as KIVI has it; as published, 0.
        weighting: what the levels minimise; "fisher" weights an error by the squared gradient of the loss, as
            published, and by the scale of the number's range; "none" is the error relative to that scale.
        refits: how many times the ranges of the keys' channels are fitted to their codes; as published, 0.
        levels: what was learned, [blocks, ...] each; None before `calibrate_cache`.
    """

    bits: Literal[4, 3, 2] = dataclasses.field(default=4, metadata=dict(static=True))
    outliers: float = dataclasses.field(default=0.01, metadata=dict(static=True))
    sinks: int = dataclasses.field(default=1, metadata=dict(static=True))
    recent: int = dataclasses.field(default=128, metadata=dict(static=True))
    weighting: Literal["fisher", "none"] = dataclasses.field(default="fisher", metadata=dict(static=True))
    refits: int = dataclasses.field(default=4, metadata=dict(static=True))
    levels: Levels | None = dataclasses.field(default=None, repr=False)
    TABLES: ClassVar[Mapping[str, type]] = {"levels": Levels}

    def __post_init__(self) -> None:
        if self.bits not in (4, 3, 2):
            raise ValueError(f"bits is {self.bits}, and 4, 3 or 2 is needed; leave the cache out to round nothing")
        if not 0 <= self.outliers <= 0.5:
            raise ValueError(f"outliers is {self.outliers}, and a share from 0 to 0.5 is needed; take 0.01")
        for name in ("sinks", "recent", "refits"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, and at least 0 is needed; take 0 for none")
        if self.weighting not in ("fisher", "none"):
            raise ValueError(f'weighting is {self.weighting!r}, and "fisher" or "none" is needed')

    @property
    def weighted(self) -> bool:
        """Whether `calibrated` needs weights."""
        return self.weighting == "fisher"

    def slots(self, channels: int) -> int:
        """The slots for outliers of a token with C channels."""
        return 2 * (int(channels * self.outliers / 2) + 1) if self.outliers else 0

    def calibrated(self, samples: Sequence[CacheSample]) -> "KVQuant":
        """This cache with levels that are learned from a sample of each block; see `any4_jax.calibrate_cache`."""
        fields = dict(bits=self.bits, share=self.outliers, refits=self.refits)
        every = [learned(s, slots=self.slots(s.keys[0].size), **fields) for s in samples]
        return dataclasses.replace(self, levels=jax.tree.map(lambda *each: jnp.stack(each), *every))

    def create(
        self, block: int, batch: int, length: int, heads: int, head_dim: int, start: jax.Array, dtype: DTypeLike
    ) -> KVQuantCache:
        """An empty cache of one block.

        Raises:
            ValueError: nothing was learned yet, or from a model of another shape.
        """
        if self.levels is None:
            raise ValueError("KVQuant has no levels yet; learn them: cache = calibrate_cache(model, KVQuant(), text)")
        blocks, *shape = self.levels.scales.shape
        wanted = Levels((blocks, 2**self.bits), (blocks, *shape), (blocks, *shape), (blocks, 2**self.bits))
        if tuple(x.shape for x in self.levels) != wanted:
            got = ", ".join(str(x.shape) for x in self.levels)
            raise ValueError(f"KVQuant has levels of shapes {got}, which don't belong together; calibrate it again")
        if block >= blocks or tuple(shape) != (heads, head_dim):
            raise ValueError(
                f"KVQuant has levels of {blocks} blocks with keys of {shape[0]} x {shape[1]} channels, and this is "
                f"block {block} with {heads} x {head_dim}; calibrate it on this model"
            )
        levels = jax.tree.map(lambda x: x[block], self.levels)
        # Blocks of equal size, of which no more are read than needed.
        coded = max(length - self.recent, 1)
        count = -(-coded // BLOCK_SLOTS)
        size = -(-coded // count)
        rest = levels, self.bits, self.slots(heads * head_dim)

        def empty(encode) -> TokenCodes:
            """Codes of zeros: masked positions that were never written are finite."""
            shapes = jax.eval_shape(lambda: encode(jnp.zeros((heads, count * size, head_dim), dtype), *rest))
            return jax.tree.map(lambda x: jnp.zeros((batch, *x.shape), x.dtype), shapes)

        exact = [jnp.zeros((batch, heads, n, head_dim), dtype) for n in (self.sinks, self.sinks, *[self.recent] * 2)]
        zero = jnp.zeros((), jnp.int32)
        return KVQuantCache(
            levels, empty(encode_keys), empty(encode_values), *exact, zero, start, length, size, self.bits
        )
