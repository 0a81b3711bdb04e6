"""KVQuant (arXiv:2401.18079): learned levels for keys before their rotation and for values, and exact outliers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from any4_jax.kv_cache.attention import BLOCK_SLOTS
from any4_jax.kv_cache.kvquant_cache import KVQuantCache
from any4_jax.kv_cache.kvquant_levels import CacheSample, learned
from any4_jax.kv_cache.nonuniform import Levels, TokenCodes, encode_keys, encode_values
from any4_jax.pytree import register_dataclass


@register_dataclass
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

    def stand_in(self, blocks: int, heads: int, head_dim: int) -> "KVQuant":
        """This cache with levels that nobody learned, for where only shapes and speed count."""
        table, ones = jnp.tile(jnp.linspace(-1, 1, 2**self.bits), (blocks, 1)), jnp.ones((blocks, heads, head_dim))
        return dataclasses.replace(self, levels=Levels(table, ones, jnp.zeros_like(ones), table))

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
        tables, ranges = (blocks, 2**self.bits), (blocks, *shape)
        if [x.shape for x in self.levels] != [tables, ranges, ranges, tables]:
            got = ", ".join(str(x.shape) for x in self.levels)
            raise ValueError(f"KVQuant has levels of shapes {got}, which don't belong together; calibrate it again")
        if block >= blocks or tuple(shape) != (heads, head_dim):
            raise ValueError(
                f"KVQuant has levels of {blocks} blocks with keys of {shape[0]} x {shape[1]} channels, and this is "
                f"block {block} with {heads} x {head_dim}; calibrate it on this model"
            )
        levels = jax.tree.map(lambda x: x[block], self.levels)
        # Blocks of equal size, of which no more are read than needed. Kernels copy eight tokens' slots or more at once.
        coded = max(length - self.recent, 1)
        count = -(-coded // BLOCK_SLOTS)
        size = -(-coded // (count * 8)) * 8
        rest = levels, self.bits, self.slots(heads * head_dim)

        def empty(encode: Callable[..., TokenCodes]) -> TokenCodes:
            """Codes of zeros: masked positions that were never written are finite."""
            shapes = jax.eval_shape(lambda: encode(jnp.zeros((heads, count * size, head_dim), dtype), *rest))
            return jax.tree.map(lambda x: jnp.zeros((batch, *x.shape), x.dtype), shapes)

        def exact(tokens: int) -> jax.Array:
            return jnp.zeros((batch, heads, tokens, head_dim), dtype)

        return KVQuantCache(
            levels,
            empty(encode_keys),
            empty(encode_values),
            exact(self.sinks),
            exact(self.sinks),
            exact(self.recent),
            exact(self.recent),
            jnp.zeros((), jnp.int32),
            start,
            length,
            size,
            self.bits,
        )
