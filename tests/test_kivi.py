"""KIVI's cache: its codes, its state after any appends, what each query sees, its size, and models that use it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from short_models import shorten

import any4_jax as a4
from any4_jax.kv_cache import AttentionSettings, DenseCache, append_attend, as_decoded
from any4_jax.kv_cache.codes import decode, encode
from any4_jax.kv_cache.kivi import Kivi, KiviCache
from any4_jax.models.rope import Rope

# B rows in S slots, H and Hkv heads; D is no multiple of the groups. Rows 1 and 2 have padding, row 2 more than R and
# more than the first piece.
B, S, H, HKV, D, G, R = 3, 60, 4, 2, 12, 8, 16
START = np.asarray([0, 3, 27], np.int32)
T = 58
POSITIONS = np.arange(T, dtype=np.int32) - START[:, None]
PIECES = (25, *[1] * 8, 25)
SMALL = Kivi(bits=4, value_bits=2, group_size=G, residual=R)
SETTINGS = AttentionSettings(scale=0.7, softcap=3.0)


def draw(rng: np.random.Generator) -> list[np.ndarray]:
    """Queries [B, T, H, D], keys and values [B, T, Hkv, D]; channel 1 of the keys is an outlier, channel 2 constant."""
    queries, keys, values = (rng.normal(size=(B, T, n, D)).astype(np.float32) for n in (H, HKV, HKV))
    keys[..., 1] += 20
    keys[..., 2] = 0.1
    values[:, 5] = 0.3
    return [queries, keys, values]


def emulated(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, steps and lowest values of float32 x [N], group by group."""
    codes, steps, lowest = np.zeros(len(x), np.uint8), [], []
    for first in range(0, len(x), G):
        group = x[first : first + G]
        step = np.float32((group.max() - group.min()) / np.float32(2**bits - 1))
        if step:
            codes[first : first + G] = np.clip(np.round((group - group.min()) / step), 0, 2**bits - 1)
        steps.append(step)
        lowest.append(group.min())
    return codes, np.asarray(steps), np.asarray(lowest)


def numbers(x: np.ndarray, bits: int) -> np.ndarray:
    """x [N, M] after quantization of each column."""
    columns = [emulated(column, bits) for column in x.T]
    return np.stack([c * np.repeat(s, G)[: len(c)] + np.repeat(low, G)[: len(c)] for c, s, low in columns], axis=1)


def unpacked(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes of bytes [N]: code i is at bit i * bits, from the lowest bit of the first byte on."""
    whole = int.from_bytes(packed.tobytes(), "little")
    return np.asarray([(whole >> (i * bits)) & (2**bits - 1) for i in range(count)], np.uint8)


def empty(factory: Any = SMALL, dtype: Any = jnp.float32) -> Any:
    return factory.create(0, B, S, HKV, D, jnp.asarray(START), dtype)


@jax.jit
def feed(cache: Any, queries: Any, keys: Any, values: Any, positions: Any) -> tuple[jax.Array, Any]:
    return append_attend(cache, queries, keys, values, positions, None, SETTINGS)


def feed_pieces(cache: Any, inputs: list[np.ndarray], run: Any = feed) -> tuple[np.ndarray, Any]:
    mixed, first = [], 0
    for tokens in PIECES:
        new = [x[:, first : first + tokens] for x in (*inputs, POSITIONS)]
        piece, cache = run(cache, *new)
        mixed.append(np.asarray(piece))
        first += tokens
    return np.concatenate(mixed, axis=1), cache


def check_state(cache: KiviCache, keys: np.ndarray, values: np.ndarray) -> None:
    """K3, K6, K2: what is stored where, row by row, after all T tokens."""
    for b, h in np.ndindex(B, HKV):
        k, v = keys[b, START[b] :, h], values[b, START[b] :, h]
        n = len(k)
        flushed, coded = n - n % R, max(0, n - R)
        codes, steps, lowest = (np.asarray(x)[b, h] for x in cache.keys.codes)
        for d in range(D):
            wanted = emulated(k[:flushed, d], 4)
            np.testing.assert_array_equal(unpacked(codes[d, : flushed // 2], 4, flushed), wanted[0])
            np.testing.assert_allclose(steps[d, : flushed // G], wanted[1], rtol=2e-7)
            np.testing.assert_array_equal(lowest[d, : flushed // G], wanted[2])
        assert not codes[:, flushed // 2 :].any() and not steps[:, flushed // G :].any()
        codes, steps, lowest = (np.asarray(x)[b, h] for x in cache.values.codes)
        for t in range(coded):
            wanted = emulated(v[t], 2)
            np.testing.assert_array_equal(unpacked(codes[t], 2, D), wanted[0])
            np.testing.assert_allclose(steps[t], wanted[1], rtol=2e-7)
            np.testing.assert_array_equal(lowest[t], wanted[2])
        assert not codes[coded:].any() and not steps[coded:].any()
        for ring, x in ((cache.recent_keys, k), (cache.recent_values, v)):
            for t in range(max(0, n - R), n):
                np.testing.assert_array_equal(np.asarray(ring)[b, h, t % R], x[t])


def formula(inputs: list[np.ndarray], judge: Any, window: int | None = None) -> np.ndarray:
    """Attention, one query of one head after another; `judge` tells a query's p from its position and its row."""
    mixed = np.zeros((B, T, H, D))
    for b, h in np.ndindex(B, H):
        q, k, v = (x[b, START[b] :, h if x.shape[2] == H else h // (H // HKV)] for x in inputs)
        coded_k, coded_v = numbers(k[: len(k) // R * R], 4), numbers(v.T, 2).T
        for t in range(len(q)):
            p = judge(t, b)
            keys, values = k[: t + 1].astype(np.float64), v[: t + 1].astype(np.float64)
            flushed, left = max(0, min(t + 1, p - p % R)), max(0, min(t + 1, p - R + 1))
            keys[:flushed], values[:left] = coded_k[:flushed], coded_v[:left]
            scores = np.exp(3.0 * np.tanh(0.7 * (keys @ q[t]) / 3.0))
            if window is not None:
                scores[: max(0, t - window + 1)] = 0
            mixed[b, START[b] + t, h] = scores / scores.sum() @ values
    return mixed


LIVE = POSITIONS >= 0


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_are_nearest_and_groups_without_extent_exact(bits: int, rng: np.random.Generator) -> None:
    rows = rng.normal(size=(6, 20)).astype(np.float32) * np.float32([[1], [1e-3], [1e4], [1], [1], [1]])
    rows[3], rows[4, :8], rows[5] = 0.1, -7e8, 3 + np.arange(20) * 1e-42
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.asarray(rows, dtype)

        @jax.jit
        def around(x: jax.Array, dtype: Any = dtype) -> tuple[Any, jax.Array]:
            codes = encode(x, bits, 8, dtype)
            return codes, decode(codes, bits, 8, 20)

        codes, got = around(x)
        wide, got = np.asarray(x, np.float32), np.asarray(got)
        assert codes.steps.dtype == dtype and np.isfinite(got).all()
        # As the group's extreme is a number of x, the offset adds no error but that of one addition.
        steps = np.repeat(np.asarray(codes.steps, np.float32), 8, axis=-1)[:, :20]
        assert (np.abs(got - wide) <= steps * 0.5001 + np.abs(wide) * 1e-6).all()
        for first in (0, 8, 16):
            group, back = wide[:, first : first + 8], got[:, first : first + 8]
            np.testing.assert_array_equal(back.min(axis=1), group.min(axis=1))
            tops = np.abs(back.max(axis=1) - group.max(axis=1))
            assert (tops <= (np.ptp(group, axis=1) * 2.0**-8 + np.abs(group).max(axis=1) * 1e-6)).all()
        np.testing.assert_array_equal(got[3], wide[3])
        np.testing.assert_array_equal(got[4, :8], wide[4, :8])


def test_the_state_is_that_of_all_tokens_at_once_bit_for_bit(rng: np.random.Generator) -> None:
    """K1, and each row of the batch as if it were alone."""
    inputs = draw(rng)
    pieces, streamed = feed_pieces(empty(), inputs)
    whole, at_once = feed(empty(), *inputs, POSITIONS)
    for a, b in zip(jax.tree.leaves(streamed), jax.tree.leaves(at_once), strict=True):
        np.testing.assert_array_equal(a, b)
    check_state(at_once, *inputs[1:])
    # A prompt is exact to itself, and so is each piece that follows.
    np.testing.assert_allclose(whole[LIVE], formula(inputs, lambda t, b: -1)[LIVE], atol=3e-6)
    ends = np.cumsum((0, *PIECES))

    def begins(t: int, b: int) -> int:
        return max(0, ends[ends <= t + START[b]].max() - START[b])

    np.testing.assert_allclose(pieces[LIVE], formula(inputs, begins)[LIVE], atol=3e-6)


def test_a_few_tokens_are_exact(rng: np.random.Generator) -> None:
    """K2: with at most R tokens it is the dense cache."""
    inputs, ours, dense = draw(rng), empty(), empty(DenseCache)
    for t in range(R):
        new = [x[:, t : t + 1] for x in (*inputs, POSITIONS)]
        (got, ours), (wanted, dense) = feed(ours, *new), feed(dense, *new)
        live = new[3] >= 0
        np.testing.assert_allclose(got[live], wanted[live], atol=3e-6)
    # Places that no token has are empty, as in the cache that gets all tokens at once.
    for ring in (ours.recent_keys, ours.recent_values):
        assert not np.asarray(ring)[1, :, R - START[1] :].any() and not np.asarray(ring)[2].any()


def test_each_query_sees_what_it_would_see_alone(rng: np.random.Generator) -> None:
    inputs, settings = draw(rng), dataclasses.replace(SETTINGS, window=21)

    @jax.jit
    def run(cache: Any, queries: Any, keys: Any, values: Any, positions: Any) -> tuple[jax.Array, Any]:
        return append_attend(cache, queries, keys, values, positions, None, settings)

    # What is stored doesn't depend on what is seen.
    first = PIECES[0]
    _, cache = feed(empty(), *(x[:, :first] for x in (*inputs, POSITIONS)))
    cache = dataclasses.replace(cache, settings=as_decoded(SMALL))
    rest, cache = run(cache, *(x[:, first:] for x in (*inputs, POSITIONS)))
    live = LIVE[:, first:]
    np.testing.assert_allclose(rest[live], formula(inputs, lambda t, b: t, 21)[:, first:][live], atol=3e-6)
    exact = formula(inputs, lambda t, b: max(0, first - START[b]), 21)[:, first:]
    assert np.abs(rest - exact)[live].max() > 1e-3, "nothing more was rounded"
    # Queries that come by themselves see what the newest token sees.
    later = jax.jit(lambda cache, *new: cache.attend(*new, None, settings))(cache, inputs[0], POSITIONS)
    np.testing.assert_allclose(later[LIVE], formula(inputs, lambda t, b: T - 1 - START[b], 21)[LIVE], atol=3e-6)


def test_keys_may_be_stored_before_their_rotation(rng: np.random.Generator) -> None:
    inputs, rope, factory = draw(rng), Rope(D, 100.0), dataclasses.replace(SMALL, rotated=False)

    @jax.jit
    def run(cache: Any, queries: Any, keys: Any, values: Any, positions: Any) -> tuple[jax.Array, Any]:
        return append_attend(cache, queries, keys, values, positions, rope, SETTINGS)

    got, cache = run(empty(as_decoded(factory)), *inputs, POSITIONS)
    check_state(cache, *inputs[1:])
    # A dense cache of what the last token sees.
    keys, values = inputs[1].copy(), inputs[2].copy()
    for b, h in np.ndindex(B, HKV):
        flushed, left = (T - 1 - START[b]) // R * R, T - R - START[b]
        k, v = keys[b, START[b] :, h], values[b, START[b] :, h]
        k[:flushed], v[:left] = numbers(k[:flushed], 4), numbers(v[:left].T, 2).T
    wanted, _ = run(empty(DenseCache), inputs[0], keys, values, POSITIONS)
    np.testing.assert_allclose(got[:, -1], wanted[:, -1], atol=1e-5)


@pytest.mark.parametrize(
    ("factory", "most"),
    [
        (Kivi(4, group_size=64), 0.30),
        (Kivi(2, group_size=64), 0.18),
        (Kivi(4), 0.33),
        (Kivi(2), 0.21),
        (Kivi(4, value_bits=2, group_size=64), 0.24),
    ],
)
def test_bytes_per_token(factory: Kivi, most: float) -> None:
    shape = 0, 1, 8192, 8, 128, jnp.zeros(1, jnp.int32), jnp.bfloat16

    def size(factory: Any) -> int:
        arrays = jax.tree.leaves(jax.eval_shape(lambda: factory.create(*shape)))
        return sum(each.size * each.dtype.itemsize for each in arrays)

    assert most - 0.01 < size(factory) / size(DenseCache) <= most


def test_a_step_copies_no_slab() -> None:
    # In float32: XLA on a CPU updates bfloat16, whatever holds it, in a copy.
    cache = Kivi(4, group_size=8, residual=16).create(0, 2, 1000, HKV, 32, jnp.zeros(2, jnp.int32), jnp.float32)
    new = [jax.ShapeDtypeStruct((2, 1, n, 32), jnp.float32) for n in (H, HKV, HKV)]
    step = jax.jit(lambda cache, *new: append_attend(cache, *new, None), donate_argnums=0)
    text = step.lower(cache, *new, jax.ShapeDtypeStruct((2, 1), jnp.int32)).compile().as_text()
    slabs = jax.tree.leaves((cache.keys, cache.values))
    assert text.split("\n", 1)[0].count("may-alias") == len(jax.tree.leaves(cache))
    assert " conditional(" in text
    for slab in slabs:
        shape = f"{dict(uint8='u8', float32='f32')[slab.dtype.name]}[{','.join(map(str, slab.shape))}]"
        made = re.findall(rf" = {re.escape(shape)}\S* ([\w-]+)\(", text)
        # What is neither a name for what is there nor a write in place would be a copy.
        assert "dynamic-update-slice" in made
        assert set(made) <= {"dynamic-update-slice", "parameter", "get-tuple-element", "fusion"}, (shape, made)
    # No array of floats is as large as the keys or the values.
    sizes = [np.prod([int(n) for n in each.split(",")]) for each in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(sizes) <= 2 * HKV * 32 * 512


def test_a_model_generates_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, tmp_path, 2)
    model, prompt = a4.models.load("tiny"), "Once upon a time, there was a little girl named Lily."
    dense = a4.generate(model, prompt, max_new_tokens=40)
    close = a4.generate(model, prompt, max_new_tokens=40, cache=Kivi(4, group_size=8, residual=8))
    assert dense[:60] == close[:60]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 3}, "bits is 3, and 4 or 2 is needed; leave the cache out"),
        ({"value_bits": 8}, "value_bits is 8, and 4 or 2 is needed"),
        ({"group_size": 12}, "group_size is 12, and a multiple of 8 is needed; take 32 or 64"),
        ({"residual": 100}, "residual is 100, and a multiple of group_size, 32, is needed, .*; take 128"),
    ],
)
def test_other_settings_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Kivi(**fields)


def test_too_many_tokens_are_refused() -> None:
    long = [np.zeros((B, S + 1, n, D), np.float32) for n in (H, HKV, HKV)]
    with pytest.raises(ValueError, match="61 tokens don't fit in a cache of 60 slots"):
        append_attend(empty(), *long, np.zeros((B, S + 1), np.int32), None)
