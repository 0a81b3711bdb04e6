"""The attention core: equal to its formula, whole or by blocks, and what it neither reads nor holds."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax.kv_cache import AttentionSettings, DenseCache, attention, attention_by_blocks
from any4_jax.kv_cache.attention import MAX_SCORES, slices
from any4_jax.models.rope import Rope

# B rows, T queries, S slots, H and Hkv heads, D. Row 1 has 6 slots of padding; the queries are the last tokens but 4.
B, T, S, H, HKV, D = 2, 19, 29, 6, 2, 8
START = np.asarray([0, 6], np.int32)
POSITIONS = (S - 4 - T) + np.arange(T, dtype=np.int32) - START[:, None]

SETTINGS = [
    AttentionSettings(),
    AttentionSettings(scale=0.7),
    AttentionSettings(softcap=1.5),
    AttentionSettings(window=1),
    AttentionSettings(window=5),
    AttentionSettings(scale=1.0, softcap=2.0, window=9),
]

Inputs = tuple[np.ndarray, np.ndarray, np.ndarray]


def draw(rng: np.random.Generator) -> Inputs:
    """Queries [B, T, H, D], keys [B * Hkv, D, S], values [B * Hkv, S, D]."""
    shapes = (B, T, H, D), (B * HKV, D, S), (B * HKV, S, D)
    queries, keys, values = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return queries, keys, values


def formula(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, settings: AttentionSettings) -> np.ndarray:
    """One query of one head after another, in float64."""
    mixed = np.zeros(queries.shape)
    for b, t, h in np.ndindex(B, T, H):
        own = POSITIONS[b, t] + START[b]
        first = START[b] if settings.window is None else max(START[b], own - settings.window + 1)
        pair = b * HKV + h // (H // HKV)
        k, v = keys[pair, :, first : own + 1].astype(np.float64), values[pair, first : own + 1]
        scores = queries[b, t, h] @ k * (D**-0.5 if settings.scale is None else settings.scale)
        if settings.softcap is not None:
            scores = settings.softcap * np.tanh(scores / settings.softcap)
        weights = np.exp(scores)
        mixed[b, t, h] = weights @ v / weights.sum()
    return mixed


@functools.partial(jax.jit, static_argnames="settings")
def whole(queries: Any, keys: Any, values: Any, settings: AttentionSettings = SETTINGS[0]) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return attention(queries, keys, values, POSITIONS, START, settings)


@functools.partial(jax.jit, static_argnames=("settings", "block", "block_queries"))
def blockwise(
    queries: Any,
    keys: Any,
    values: Any,
    settings: AttentionSettings = SETTINGS[0],
    block: int = 8,
    block_queries: int = 5,
) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return attention_by_blocks(
            queries, slices(keys, values, block), S, POSITIONS, START, settings, block_queries=block_queries
        )


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_attention_is_its_formula(settings: AttentionSettings, rng: np.random.Generator) -> None:
    inputs = draw(rng)
    wanted = formula(*inputs, settings)
    for got in whole(*inputs, settings), blockwise(*inputs, settings):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, wanted, atol=2e-6, rtol=0)


# Blocks that divide the 29 slots and 19 queries and such as don't, larger and smaller than the window.
@pytest.mark.parametrize("block, block_queries", [(1, 19), (4, 1), (10, 7), (28, 64), (29, 2), (64, 19)])
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[-1]], ids=str)
def test_blocks_change_nothing(
    settings: AttentionSettings, block: int, block_queries: int, rng: np.random.Generator
) -> None:
    inputs = draw(rng)
    got = blockwise(*inputs, settings, block, block_queries)
    np.testing.assert_allclose(got, whole(*inputs, settings), atol=1e-6, rtol=0)


def test_scores_far_apart_stay_finite(rng: np.random.Generator) -> None:
    queries, keys, values = draw(rng)
    got = blockwise(1e4 * queries, keys, values)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, whole(1e4 * queries, keys, values), atol=1e-6, rtol=0)


def test_blocks_of_bfloat16_equal_the_whole(rng: np.random.Generator) -> None:
    inputs = [x.astype(jnp.bfloat16) for x in draw(rng)]
    got = blockwise(*inputs)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), whole(*inputs).astype(np.float32), atol=0.02, rtol=0)


def test_padding_queries_are_finite_and_change_no_other(rng: np.random.Generator) -> None:
    queries, keys, values = draw(rng)
    positions = np.arange(T, dtype=np.int32) - START[:, None]

    @jax.jit
    def run(keys: np.ndarray) -> tuple[jax.Array, jax.Array]:
        blocks = slices(keys, values, 4)
        return (
            attention(queries, keys, values, positions, START),
            attention_by_blocks(queries, blocks, S, positions, START, block_queries=3),
        )

    ours, changed = keys.copy(), keys.copy()
    changed[HKV:, :, : START[1]] = 7
    for before, after in zip(run(ours), run(changed), strict=True):
        assert np.isfinite(before).all()
        np.testing.assert_array_equal(before[1, START[1] :], after[1, START[1] :])


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[-1]], ids=str)
def test_gradients_by_blocks_equal_those_of_the_whole(settings: AttentionSettings, rng: np.random.Generator) -> None:
    inputs = draw(rng)
    direction = rng.normal(size=(B, T, H, D)).astype(np.float32)

    def gradients(function: Any) -> Any:
        return jax.jit(jax.grad(lambda inputs: jnp.vdot(direction, function(*inputs, settings))))(inputs)

    for got, wanted in zip(gradients(blockwise), gradients(whole), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("block_queries", [64, 5])
def test_blocks_that_no_query_sees_are_not_read(block_queries: int, rng: np.random.Generator) -> None:
    queries, keys, values = draw(rng)
    settings = AttentionSettings(window=3)
    wanted = blockwise(queries, keys, values, settings, 4, block_queries)
    # Queries lie in slots 6..24 and see slots from 4 on. Slots 0..3 are the first block; 28 is in the last one alone.
    for unseen in slice(0, 4), slice(28, 29):
        keys[:, :, unseen] = values[:, unseen] = np.nan
    np.testing.assert_array_equal(blockwise(queries, keys, values, settings, 4, block_queries), wanted)


def test_a_long_prefill_never_holds_its_scores() -> None:
    tokens, heads, size = 2048, 8, 8
    assert heads * tokens**2 > MAX_SCORES
    queries = jax.ShapeDtypeStruct((1, tokens, heads, size), jnp.float32)
    keys = jax.ShapeDtypeStruct((heads, size, tokens), jnp.float32)
    values = jax.ShapeDtypeStruct((heads, tokens, size), jnp.float32)
    positions = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def bytes_of(function: Any) -> int:
        compiled = jax.jit(function).lower(queries, keys, values, positions).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def forward(queries: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array) -> jax.Array:
        return attention(queries, keys, values, positions, jnp.zeros(1, jnp.int32))

    scores = 4 * heads * tokens**2
    assert bytes_of(forward) < scores / 4
    assert bytes_of(jax.grad(lambda *inputs: forward(*inputs).sum())) < scores / 2


def test_one_token_attends_in_one_piece_whatever_the_length() -> None:
    slots = 2 * MAX_SCORES
    shapes = [((1, 1, 1, 2), jnp.float32), ((1, 2, slots), jnp.float32), ((1, slots, 2), jnp.float32)]
    shapes += [((1, 1), jnp.int32), ((1,), jnp.int32)]
    text = str(jax.make_jaxpr(attention)(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)))
    assert "scan" not in text
    assert "dot_general" in text


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[4], SETTINGS[5]], ids=str)
@pytest.mark.parametrize("rope", [Rope(D, 10000.0), None], ids=["rope", "no rope"])
def test_cached_decoding_equals_the_whole_across_windows(
    settings: AttentionSettings, rope: Rope | None, rng: np.random.Generator
) -> None:
    queries = rng.normal(size=(B, T, H, D)).astype(np.float32)
    keys, values = rng.normal(size=(2, B, T, HKV, D)).astype(np.float32)
    positions = np.arange(T, dtype=np.int32) - START[:, None]

    @jax.jit
    def feed(cache: DenseCache, queries: Any, keys: Any, values: Any, positions: Any) -> tuple[jax.Array, DenseCache]:
        cache = cache.append(keys, values, positions, rope)
        return cache.attend(queries, positions, rope, settings), cache

    empty = DenseCache.create(0, B, S, HKV, D, jnp.asarray(START), jnp.float32)
    wanted, _ = feed(empty, queries, keys, values, positions)
    got, cache, first = [], empty, 0
    for step in (7, 4, *[1] * (T - 11)):
        new = slice(first, first + step)
        piece, cache = feed(cache, queries[:, new], keys[:, new], values[:, new], positions[:, new])
        got.append(np.asarray(piece))
        first += step
    for b in range(B):
        joined = np.concatenate(got, axis=1)[b, START[b] :]
        np.testing.assert_allclose(joined, wanted[b, START[b] :], atol=2e-6, rtol=0)


def test_without_a_rope_keys_and_queries_stay_as_they_are(rng: np.random.Generator) -> None:
    queries, keys, values = rng.normal(size=(3, 1, 6, 2, D)).astype(np.float32)
    positions = np.arange(6, dtype=np.int32)[None]
    empty = DenseCache.create(0, 1, 6, 2, D, jnp.zeros(1, jnp.int32), jnp.float32)
    cache = empty.append(keys, values, positions, None)
    np.testing.assert_array_equal(cache.keys, keys[0].transpose(1, 2, 0))
    still = cache.append(keys, values, 0 * positions, Rope(D, 10000.0))
    np.testing.assert_array_equal(still.keys, cache.keys)
    np.testing.assert_allclose(
        cache.attend(queries, positions, None),
        attention(queries, cache.keys, cache.values, positions, cache.start),
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"scale": float("nan")}, "scale is nan"),
        ({"softcap": 0.0}, r"softcap is 0\.0"),
        ({"softcap": float("inf")}, "softcap is inf"),
        ({"window": 0}, "window is 0"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AttentionSettings(**fields)


def test_settings_are_hashable_and_differ_by_value() -> None:
    assert {AttentionSettings(window=4): 1}[AttentionSettings(window=4)] == 1
    assert AttentionSettings(window=4) != AttentionSettings(window=5)


def test_a_block_larger_than_the_cache_is_refused(rng: np.random.Generator) -> None:
    queries, keys, values = draw(rng)
    with pytest.raises(ValueError, match="a block holds 8 slots and the cache 6"):
        attention_by_blocks(queries, slices(keys, values, 8), 6, POSITIONS, START)
