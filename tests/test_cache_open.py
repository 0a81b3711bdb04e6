"""Caches from outside of the package: tables per block that are traced, static settings, decoding by blocks."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import any4_jax as a4
from any4_jax.kv_cache import (
    PLAIN,
    AttentionSettings,
    Cache,
    CacheFactory,
    DenseCache,
    Rope,
    attention_by_blocks,
    rotated,
)
from any4_jax.models.llama import Llama
from any4_jax.models.tiny import random_llama
from any4_jax.pytree import register_dataclass

ROWS = [[5, 9, 2], [100, 3, 3, 7, 64, 2, 8], [1]]
LEVELS = 16


def nearest(values: jax.Array, table: jax.Array) -> jax.Array:
    """The uint8 code of the entry of table [LEVELS] nearest to each value."""
    return jnp.abs(values[..., None] - table).argmin(axis=-1).astype(jnp.uint8)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class TableCache:
    """Keys as they are, [B * Hkv, D, S]; values as codes [B * Hkv, S, D] into the block's table, decoded by blocks."""

    keys: jax.Array
    codes: jax.Array
    table: jax.Array
    length: jax.Array
    start: jax.Array
    block: int = dataclasses.field(metadata=dict(static=True))
    traces: ClassVar[list[int]] = []

    def append(self, keys: jax.Array, values: jax.Array, positions: jax.Array, rope: Rope | None) -> Self:
        def write(slab: jax.Array, new: jax.Array, axis: int) -> jax.Array:
            new = new.reshape(-1, *new.shape[2:]).astype(slab.dtype)
            return jax.lax.dynamic_update_slice_in_dim(slab, new, self.length, axis)

        codes = nearest(values, self.table)
        return dataclasses.replace(
            self,
            keys=write(self.keys, rotated(keys, positions, rope).transpose(0, 2, 3, 1), 2),
            codes=write(self.codes, codes.transpose(0, 2, 1, 3), 1),
            length=self.length + keys.shape[1],
        )

    def attend(
        self, queries: jax.Array, positions: jax.Array, rope: Rope | None, settings: AttentionSettings = PLAIN
    ) -> jax.Array:
        self.traces.append(queries.shape[1])

        def read(first: jax.Array) -> tuple[jax.Array, jax.Array]:
            keys = jax.lax.dynamic_slice_in_dim(self.keys, first, self.block, 2)
            return keys, self.table[jax.lax.dynamic_slice_in_dim(self.codes, first, self.block, 1)]

        slots = self.keys.shape[-1]
        return attention_by_blocks(rotated(queries, positions, rope), read, slots, positions, self.start, settings)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Tables:
    """A factory of `TableCache`: tables [blocks, LEVELS] are traced, the block's size is static."""

    tables: Any
    block: int = dataclasses.field(default=16, metadata=dict(static=True))

    def create(
        self, block: int, batch: int, length: int, heads: int, head_dim: int, start: jax.Array, dtype: Any
    ) -> TableCache:
        keys = jnp.zeros((batch * heads, head_dim, length), dtype)
        codes = jnp.zeros((batch * heads, length, head_dim), jnp.uint8)
        return TableCache(keys, codes, self.tables[block], jnp.zeros((), jnp.int32), start, self.block)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundedCache(DenseCache):
    """What `TableCache` stands for, without codes: a dense cache of values rounded to the table."""

    table: jax.Array

    def append(self, keys: jax.Array, values: jax.Array, positions: jax.Array, rope: Rope | None) -> Self:
        return super().append(keys, self.table[nearest(values, self.table)], positions, rope)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    tables: Any

    def create(self, block: int, *args: Any) -> RoundedCache:
        dense = DenseCache.create(block, *args)
        return RoundedCache(dense.keys, dense.values, dense.length, dense.start, self.tables[block])


@register_dataclass
@dataclasses.dataclass(frozen=True)
class WindowedCache(DenseCache):
    """A dense cache that attends with settings of its own."""

    settings: AttentionSettings = dataclasses.field(metadata=dict(static=True))

    def attend(
        self, queries: jax.Array, positions: jax.Array, rope: Rope | None, settings: AttentionSettings = PLAIN
    ) -> jax.Array:
        return super().attend(queries, positions, rope, self.settings)


@dataclasses.dataclass(frozen=True)
class Windowed:
    """A factory that is no pytree: hashable settings, which differ from block to block as Gemma's do."""

    windows: tuple[int | None, ...]

    def create(self, block: int, *args: Any) -> WindowedCache:
        dense = DenseCache.create(block, *args)
        settings = AttentionSettings(window=self.windows[block])
        return WindowedCache(dense.keys, dense.values, dense.length, dense.start, settings)


@pytest.fixture(scope="module")
def model() -> Llama:
    """Two blocks of random weights, with a spread head: the likeliest token varies along a text."""
    model = random_llama()
    model.lm_head.kernel.set_value(model.lm_head.kernel.get_value() * 4)
    return model


def tables(*widths: float) -> np.ndarray:
    """A table for each block: LEVELS even levels within -width..width."""
    return np.linspace(-1, 1, LEVELS, dtype=np.float32) * np.asarray(widths, np.float32)[:, None]


def test_values_are_rounded_to_the_table_of_their_block(model: Llama) -> None:
    ours = tables(2.0, 0.4)
    got = a4.generate(model, ROWS, max_new_tokens=20, cache=Tables(ours))
    assert got == a4.generate(model, ROWS, max_new_tokens=20, cache=Rounded(ours))
    assert got != a4.generate(model, ROWS, max_new_tokens=20)
    assert got != a4.generate(model, ROWS, max_new_tokens=20, cache=Tables(ours[::-1]))


def test_tables_are_traced_and_settings_static(model: Llama, count_compiles: Any) -> None:
    a4.generate(model, ROWS, max_new_tokens=9, cache=Tables(tables(2.0, 0.4)))
    others = jnp.asarray(tables(0.3, 1.0)), tables(1.0, 1.5)
    with count_compiles() as compiles:
        new = [a4.generate(model, ROWS, max_new_tokens=9, cache=Tables(other)) for other in others]
    assert compiles.count == 0
    assert new[0] != new[1]
    with count_compiles() as compiles:
        assert new[1] == a4.generate(model, ROWS, max_new_tokens=9, cache=Tables(others[1], block=32))
    assert sorted(compiles.names) == ["jit(_decode)", "jit(_prefill)"]


def test_blocks_whose_caches_are_alike_share_one_program(model: Llama) -> None:
    TableCache.traces.clear()
    a4.generate(model, ROWS, max_new_tokens=3, cache=Tables(tables(1.5, 0.7), block=64))
    # Two blocks, each traced once for the prompt (padded to 32 tokens) and once for a token.
    assert TableCache.traces == [32, 1]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared(Tables):
    """All blocks hold the factory's own table [LEVELS]."""

    def create(self, block: int, *args: Any) -> TableCache:
        return dataclasses.replace(super().create(0, *args), table=self.tables)


def test_the_tables_of_a_factory_outlive_the_caches(model: Llama) -> None:
    # Decoding donates the caches; what it gives back to the device must be no array of the caller.
    factory = Shared(jnp.asarray(tables(1.0)[0]))
    first = a4.generate(model, ROWS, max_new_tokens=20, cache=factory)
    assert not factory.tables.is_deleted()
    assert first == a4.generate(model, ROWS, max_new_tokens=20, cache=factory)


@pytest.mark.parametrize(
    "factory",
    [Windowed((4, None)), Windowed((3, 9)), Tables(tables(2.0, 1.0))],
    ids=["a window in one block", "two windows", "tables"],
)
def test_cached_decoding_equals_the_whole_forward(
    model: Llama, factory: CacheFactory, rng: np.random.Generator
) -> None:
    rows, length = 2, 24
    start = np.asarray([0, 5], np.int32)
    tokens = rng.integers(0, 128, (rows, length)).astype(np.int32)

    @jax.jit
    def feed(model: Llama, tokens: Any, caches: list[Cache], first: Any) -> tuple[jax.Array, list[Cache]]:
        positions = first + jnp.arange(tokens.shape[1], dtype=jnp.int32) - start[:, None]
        x, caches = model.decode(tokens, caches, positions)
        return model.head(x), caches

    def init(cache: CacheFactory = DenseCache) -> list[Cache]:
        return model.init_cache(rows, 32, start=jnp.asarray(start), cache=cache)

    wanted, _ = feed(model, tokens, init(factory), 0)
    full, _ = feed(model, tokens, init(), 0)
    caches, got, first = init(factory), [], 0
    for step in (7, 5, *[1] * (length - 12)):
        piece, caches = feed(model, tokens[:, first : first + step], caches, np.int32(first))
        got.append(np.asarray(piece))
        first += step
    for b in range(rows):
        joined = np.concatenate(got, axis=1)[b, start[b] :]
        np.testing.assert_allclose(joined, wanted[b, start[b] :], atol=1e-4, rtol=0)
        assert np.abs(joined - full[b, start[b] :]).max() > 1e-2


def test_a_hashable_factory_is_static_and_makes_another_program_where_it_differs(
    model: Llama, count_compiles: Any
) -> None:
    new = a4.generate(model, ROWS, max_new_tokens=9, cache=Windowed((2, None)))
    assert new != a4.generate(model, ROWS, max_new_tokens=9)
    with count_compiles() as compiles:
        assert new == a4.generate(model, ROWS, max_new_tokens=9, cache=Windowed((2, None)))
    assert compiles.count == 0
    with count_compiles() as compiles:
        a4.generate(model, ROWS, max_new_tokens=9, cache=Windowed((None, None)))
    assert sorted(compiles.names) == ["jit(_decode)", "jit(_prefill)"]


def test_what_is_no_factory_is_refused(model: Llama) -> None:
    loose = dataclasses.make_dataclass("Loose", ["windows"], namespace={"create": Windowed.create})((2, None))
    with pytest.raises(TypeError, match="factory is a Loose, which is neither a pytree nor hashable"):
        a4.generate(model, ROWS, cache=loose)
    with pytest.raises(TypeError, match="factory is a int, and an object with a method `create` is needed"):
        a4.generate(model, ROWS, cache=4)
    with pytest.raises(TypeError, match="factory is the class Windowed, and an instance is needed; call the class"):
        a4.generate(model, ROWS, cache=cast(Any, Windowed))
