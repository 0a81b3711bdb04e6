"""Attention of rounded queries, keys, values and weights: its formula, causality, and a model that uses it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax.kv_cache import AttentionSettings, DenseCache, RoundedAttention, append_attend, attention_by_blocks
from any4_jax.kv_cache.attention import slices
from any4_jax.models.tiny import random_llama

# B rows, T tokens in S slots, H and Hkv heads, D. Row 1 has 3 slots of padding.
B, T, S, H, HKV, D = 2, 9, 11, 4, 2, 8
START = np.asarray([0, 3], np.int32)
POSITIONS = np.arange(T, dtype=np.int32) - START[:, None]
SETTINGS = AttentionSettings(scale=0.7, softcap=3.0, window=6)


def integers(x: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    """A vector rounded as published: minimum and maximum, 0 among them, in float64."""
    low, high = min(x.min(), 0), max(x.max(), 0)
    if symmetric:
        step = max(-low, high) / (2 ** (bits - 1) - 1)
        return np.round(x / step) * step
    step = (high - low) / (2**bits - 1)
    zero = np.round(-low / step)
    return step * (np.clip(np.round(x / step) + zero, 0, 2**bits - 1) - zero)


def formula(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    """One query of one head after another; values are rounded by token."""
    mixed = np.zeros(queries.shape)
    for b, t, h in np.ndindex(B, T, H):
        if POSITIONS[b, t] < 0:
            continue
        seen = range(max(START[b], t - 5), t + 1)
        q = integers(queries[b, t, h].astype(np.float64), bits, symmetric)
        k, v = (
            np.stack([integers(x[b, s, h // (H // HKV)].astype(np.float64), bits, symmetric) for s in seen])
            for x in (keys, values)
        )
        scores = np.exp(3.0 * np.tanh(0.7 * (k @ q) / 3.0))
        mixed[b, t, h] = integers(scores / scores.sum(), bits, False) @ v
    return mixed


def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries [B, T, H, D], keys and values [B, T, Hkv, D]."""
    queries, keys, values = (rng.normal(size=(B, T, n, D)).astype(np.float32) for n in (H, HKV, HKV))
    return queries, keys, values + 0.5


def empty(factory: Any) -> Any:
    return factory.create(0, B, S, HKV, D, jnp.asarray(START), jnp.float32)


@jax.jit
def feed(cache: Any, queries: Any, keys: Any, values: Any, positions: Any) -> tuple[jax.Array, Any]:
    return append_attend(cache, queries, keys, values, positions, None, SETTINGS)


@pytest.mark.parametrize("bits, symmetric", [(8, False), (3, True), (4, False)])
def test_it_is_the_published_formula_by_token(bits: int, symmetric: bool, rng: np.random.Generator) -> None:
    inputs, rounding = draw(rng), RoundedAttention(bits, symmetric)  # type: ignore[arg-type]
    mixed, cache = feed(empty(rounding), *inputs, POSITIONS)
    wanted, live = formula(*inputs, bits, symmetric), POSITIONS >= 0
    np.testing.assert_allclose(mixed[live], wanted[live], atol=1e-5)
    floats, _ = feed(empty(DenseCache), *inputs, POSITIONS)
    assert np.abs(mixed - floats)[live].max() > 1e-3, "nothing was rounded"

    @jax.jit
    def by_blocks(queries: Any, cache: Any) -> jax.Array:
        read, queries = slices(cache.keys, cache.values, 4), rounding.rounded(queries)
        where = POSITIONS, START, SETTINGS
        return attention_by_blocks(queries, read, S, *where, block_queries=4, weight_bits=bits)

    np.testing.assert_allclose(by_blocks(inputs[0], cache)[live], wanted[live], atol=1e-5)


def test_what_a_token_sees_depends_on_no_later_one(rng: np.random.Generator) -> None:
    """Neither on what comes later, nor on how many tokens come at once."""
    inputs = draw(rng)
    whole, _ = feed(empty(RoundedAttention(4)), *inputs, POSITIONS)
    for x in inputs:
        x[:, 7:] *= 100
    changed, _ = feed(empty(RoundedAttention(4)), *inputs, POSITIONS)
    live = POSITIONS >= 0
    np.testing.assert_array_equal(changed[:, :7][live[:, :7]], whole[:, :7][live[:, :7]])
    cache, pieces = empty(RoundedAttention(4)), []
    for t in range(T):
        piece, cache = feed(cache, *(x[:, t : t + 1] for x in inputs), POSITIONS[:, t : t + 1])
        pieces.append(np.asarray(piece))
    np.testing.assert_allclose(np.concatenate(pieces, 1)[live], changed[live], rtol=1e-4, atol=1e-5)


def test_a_model_attends_so_by_its_cache() -> None:
    model = random_llama()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 12, 48)), jnp.float32)

    @jax.jit
    def block(model: Any, x: jax.Array, cache: Any) -> jax.Array:
        return model.blocks[0](x, cache, jnp.arange(12, dtype=jnp.int32)[None])[0]

    floats, *rounded = (
        np.asarray(block(model, x, model.init_cache(1, 12, cache=factory)[0]))
        for factory in (DenseCache, RoundedAttention(8), RoundedAttention(3))
    )
    few, fewer = (np.abs(y - floats).mean() for y in rounded)
    assert 0 < 10 * few < fewer


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="bits is 16, and 2 to 8 is needed; leave the cache out"):
        RoundedAttention(16)  # type: ignore[arg-type]
