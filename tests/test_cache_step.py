"""`append_attend`: one call in place of two, of the same result, and who does it."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax.kv_cache import (
    PLAIN,
    AttentionSettings,
    Cache,
    DenseCache,
    PairRope,
    Rope,
    append_attend,
    rotate_pairs,
)
from any4_jax.models import rope as ropes
from any4_jax.models.rope_scaling import DynamicScaling, YarnScaling
from any4_jax.pytree import register_dataclass

B, S, H, HKV, D = 2, 16, 6, 2, 8
START = np.asarray([0, 3], np.int32)


def draw(tokens: int) -> list[np.ndarray]:
    rng = np.random.default_rng(tokens)
    return [rng.normal(size=(B, tokens, n, D)).astype(np.float32) for n in (H, HKV, HKV)]


def empty(kind: type[DenseCache] = DenseCache) -> DenseCache:
    return kind.create(0, B, S, HKV, D, jnp.asarray(START), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Halves:
    """A rope of its own kind, without factors."""

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return x * (1 + 0.1 * positions[:, :, None, None]).astype(x.dtype)


@pytest.mark.parametrize("rope", [ropes.Rope(D, 100.0), Halves(), None], ids=["pairs", "another", "none"])
@pytest.mark.parametrize("settings", [PLAIN, AttentionSettings(scale=0.7, softcap=2.0, window=3)], ids=str)
def test_it_equals_append_then_attend(rope: Rope | None, settings: AttentionSettings) -> None:
    @jax.jit
    def together(cache: DenseCache, *new: Any) -> tuple[jax.Array, Cache]:
        return append_attend(cache, *new, rope, settings)

    @jax.jit
    def apart(cache: DenseCache, queries: Any, keys: Any, values: Any, positions: Any) -> tuple[jax.Array, Cache]:
        cache = cache.append(keys, values, positions, rope)
        return cache.attend(queries, positions, rope, settings), cache

    one, other, first = empty(), empty(), 0
    for tokens in (5, 1, 2, 1):
        new = *draw(tokens), first + np.arange(tokens, dtype=np.int32) - START[:, None]
        (mixed, one), (wanted, other) = together(one, *new), apart(other, *new)
        for a, b in zip(jax.tree.leaves((mixed, one)), jax.tree.leaves((wanted, other)), strict=True):
            np.testing.assert_array_equal(a, b)
        first += tokens
    assert int(one.length) == first


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Doubling(DenseCache):
    """Overrides one of the two."""

    def append(self, keys: jax.Array, values: jax.Array, positions: jax.Array, rope: Rope | None) -> Self:
        return super().append(keys, 2 * values, positions, rope)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Both(Doubling):
    """Overrides what does both, below."""

    def append_attend(self, *new: Any) -> tuple[jax.Array, Self]:
        mixed, cache = super().append_attend(*new)
        return 10 * mixed, cache


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Inherits(Both):
    """Overrides nothing."""


@pytest.mark.parametrize(("kind", "factor"), [(DenseCache, 1), (Doubling, 2), (Both, 10), (Inherits, 10)])
def test_an_overridden_method_is_never_bypassed(kind: type[DenseCache], factor: int) -> None:
    queries, keys, values = draw(1)
    mixed, cache = append_attend(empty(kind), queries, keys, values, -START[:, None], None)
    assert isinstance(cache, kind)
    np.testing.assert_allclose(mixed[0, 0], factor * np.repeat(values[0, 0], H // HKV, axis=0), rtol=1e-6)


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="17 tokens don't fit in a cache of 16 slots"):
        append_attend(empty(), *draw(17), np.zeros((B, 17), np.int32), None)


SCALINGS = [
    None,
    DynamicScaling(factor=2.0, original_max_position_embeddings=8),
    YarnScaling(factor=4.0, original_max_position_embeddings=8),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_the_factors_of_a_rope_are_its_rotation(scaling: Any) -> None:
    rope, positions = ropes.Rope(D, 100.0, scaling), 7 + np.arange(5, dtype=np.int32) - START[:, None]
    x = draw(5)[0]
    assert isinstance(rope, PairRope) and not isinstance(Halves(), PairRope)
    cos, sin = rope.factors(positions)
    assert cos.shape == sin.shape == (B, 5, D // 2) and cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_array_equal(rotate_pairs(x, cos, sin), rope.rotate(x, positions))
    low, high = np.split(x, 2, axis=-1)
    turned = (low + 1j * high) * (np.asarray(cos) + 1j * np.asarray(sin))[:, :, None]
    np.testing.assert_allclose(
        rope.rotate(x, positions), np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-6
    )
