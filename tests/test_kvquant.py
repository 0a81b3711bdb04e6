"""KVQuant's cache: its codes, its state after any appends, what each query sees, its levels, and models that use it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from short_models import shorten

import any4_jax as a4
from any4_jax.kv_cache import AttentionSettings, DenseCache, KVQuant, append_attend, as_decoded
from any4_jax.kv_cache.nonuniform import Levels, decode_keys, decode_values, encode_keys, encode_values
from any4_jax.models.llama import Llama
from any4_jax.models.rope import Rope
from any4_jax.models.rope_scaling import RopeScaling

# B rows in S slots, H and Hkv heads, C channels of a token. Row 1 has padding, row 2 more than R and more than the
# first piece.
B, S, H, HKV, D, R = 3, 60, 4, 2, 12, 16
C = HKV * D
START = np.asarray([0, 3, 27], np.int32)
T = 58
POSITIONS = np.arange(T, dtype=np.int32) - START[:, None]
LIVE = POSITIONS >= 0
PIECES = (25, *[1] * 8, 25)
SETTINGS = AttentionSettings(scale=0.7, softcap=3.0, window=40)
SCALING = RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=16)
ROPE = Rope(D, 100.0, SCALING)


def levels(bits: int, blocks: int = 1) -> Levels:
    """Levels of blocks that differ, in no even steps; the ranges of channels differ too."""
    rng = np.random.default_rng(bits)
    tables = np.sort(rng.uniform(-1.2, 1.2, (2, blocks, 2**bits)).astype(np.float32), axis=-1)
    scales = rng.uniform(0.5, 2, (blocks, HKV, D)).astype(np.float32)
    return Levels(tables[0], scales, rng.normal(size=scales.shape).astype(np.float32), tables[1])


def factory(bits: Any = 3, recent: int = 0, **fields: Any) -> KVQuant:
    return KVQuant(bits, 0.1, 2, recent, levels=levels(bits, 2), **fields)


def draw(rng: np.random.Generator) -> list[np.ndarray]:
    """Queries [B, T, H, D], keys and values [B, T, Hkv, D] with some numbers far out."""
    queries, keys, values = (rng.normal(size=(B, T, n, D)).astype(np.float32) for n in (H, HKV, HKV))
    for x in (keys, values):
        x[rng.random(x.shape) < 0.03] *= 9
    values[:, 7] = 0.3
    return [queries, keys, values]


def rounded(z: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The nearest entry; the first of two that are as near."""
    return table[np.abs(z[..., None] - table).argmin(axis=-1)]


def emulated_keys(k: np.ndarray, of: Levels, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys [N, Hkv, D] after quantization, and bool, which of them are outliers."""
    z = ((k - of.offsets) / of.scales).reshape(len(k), -1)
    out = np.zeros(z.shape, bool)
    np.put_along_axis(out, np.argsort(-np.abs(z), axis=1, kind="stable")[:, :slots], True, axis=1)
    out = out.reshape(k.shape)
    return np.where(out, k, rounded(z, of.keys).reshape(k.shape) * of.scales + of.offsets), out


def emulated_values(v: np.ndarray, of: Levels, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Values [N, Hkv, D] after quantization, and bool, which of them are outliers."""
    flat = v.reshape(len(v), -1)
    order = np.argsort(flat, axis=1, kind="stable")
    inner = np.take_along_axis(flat, order[:, slots // 2 : flat.shape[1] - slots // 2], axis=1)
    top, bottom = inner.max(axis=1, keepdims=True), inner.min(axis=1, keepdims=True)
    scale, offset = (top - bottom) / 2, (top + bottom) / 2
    out = np.zeros(flat.shape, bool)
    np.put_along_axis(out, np.argsort(-flat, axis=1, kind="stable")[:, : slots // 2], True, axis=1)
    np.put_along_axis(out, order[:, : slots // 2], True, axis=1)
    z = np.where(scale > 0, (flat - offset) / np.where(scale > 0, scale, 1), 0)
    return np.where(out, flat, rounded(z, of.values) * scale + offset).reshape(v.shape), out.reshape(v.shape)


def of_block(all_levels: Any, block: int) -> Levels:
    return Levels(*(np.asarray(x)[block] for x in all_levels))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_v1_v2_v3_v5_v7(bits: int, rng: np.random.Generator) -> None:
    """V1: outliers as they were; V2: others on the levels; V3: how many; V5: each token by itself; V7: packed codes
    give the numbers of the formula."""
    _, keys, values = draw(rng)
    of, slots = of_block(levels(bits), 0), KVQuant(bits, 0.1).slots(C)
    assert slots == 4

    @jax.jit
    def around(k: jax.Array, v: jax.Array) -> tuple[Any, ...]:
        coded = encode_keys(k, of, bits, slots), encode_values(v, of, bits, slots)
        alone = jax.tree.map(lambda x: x[None], coded)
        return coded, (decode_keys(alone[0], of, bits)[0], decode_values(alone[1], of, bits)[0])

    k, v = keys[0], values[0]
    coded, got = around(k.swapaxes(0, 1), v.swapaxes(0, 1))
    for x, back, emulate in ((k, got[0], emulated_keys), (v, got[1], emulated_values)):
        back = np.asarray(back).swapaxes(0, 1)
        wanted, out = emulate(x, of, slots)
        np.testing.assert_array_equal(back[out], x[out])
        np.testing.assert_allclose(back, wanted, rtol=2e-6, atol=2e-6)
        constant = (x == x[:, :1, :1]).all(axis=(1, 2))
        assert (out.reshape(T, -1).sum(axis=1)[~constant] == slots).all()
    inside = np.where(
        emulated_keys(k, of, slots)[1], np.nan, (np.asarray(got[0]).swapaxes(0, 1) - of.offsets) / of.scales
    )
    assert all(len(np.unique(np.round(inside[:, h, d], 4))) <= 2**bits + 1 for h, d in np.ndindex(HKV, D))
    order = rng.permutation(T)
    moved = around(k[order].swapaxes(0, 1), v[order].swapaxes(0, 1))
    for a, b in zip(jax.tree.leaves((coded, got)), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[:, order], b)


def test_slots_are_of_the_share_v3() -> None:
    assert [KVQuant().slots(channels) for channels in (192, 1024, 4096)] == [2, 12, 42]
    assert KVQuant(outliers=0).slots(1024) == 0


def empty(cache: Any, dtype: Any = jnp.float32) -> Any:
    return cache.create(1, B, S, HKV, D, jnp.asarray(START), dtype)


@jax.jit
def feed(cache: Any, queries: Any, keys: Any, values: Any, positions: Any) -> tuple[jax.Array, Any]:
    return append_attend(cache, queries, keys, values, positions, ROPE, SETTINGS)


def formula(inputs: list[np.ndarray], cache: KVQuant) -> np.ndarray:
    """Attention, one query of one head after another, over keys that are rotated after they are quantized."""
    mixed, of, slots = np.zeros((B, T, H, D)), of_block(cache.levels, 1), cache.slots(C)

    def turned(x: np.ndarray) -> np.ndarray:
        angles = np.arange(len(x))[:, None] * np.asarray(ROPE.frequencies(), np.float64)
        (low, high), cos, sin = np.split(x, 2, axis=-1), np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    for b in range(B):
        q, k, v = (x[b, START[b] :] for x in inputs)
        coded_k, coded_v = emulated_keys(k, of, slots)[0], emulated_values(v, of, slots)[0]
        turned_q, exact, coded = turned(q), turned(k), turned(coded_k)
        pairs = [np.hypot(*np.split(x, 2, axis=-1)) for x in (coded, coded_k)]
        np.testing.assert_allclose(*pairs, rtol=1e-5)
        for t, h in np.ndindex(len(q), H):
            keys, values = exact[: t + 1, h // 2].copy(), v[: t + 1, h // 2].astype(np.float64)
            rest = slice(2, max(2, t + 1 - cache.recent))
            keys[rest], values[rest] = coded[rest, h // 2], coded_v[rest, h // 2]
            scores = np.exp(3.0 * np.tanh(0.7 * (keys @ turned_q[t, h]) / 3.0))
            scores[: max(0, t - 39)] = 0
            mixed[b, START[b] + t, h] = scores / scores.sum() @ values
    return mixed


@pytest.mark.parametrize("recent", [0, R])
def test_streamed_tokens_equal_those_at_once_v5_v6_v8(recent: int, rng: np.random.Generator) -> None:
    """Bit for bit, and each row of the batch as if it were alone. V8: which tokens are exact is a matter of their
    position in their row: no later token is, decoded alone or not, unless it is among the newest. V6: keys are rotated
    after they are quantized."""
    inputs, cache = draw(rng), factory(recent=recent)
    at_once, whole = feed(empty(cache), *inputs, POSITIONS)
    mixed, streamed, first = [], empty(cache), 0
    for tokens in PIECES:
        piece, streamed = feed(streamed, *(x[:, first : first + tokens] for x in (*inputs, POSITIONS)))
        mixed.append(np.asarray(piece))
        first += tokens
    for a, b in zip(jax.tree.leaves(streamed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    wanted = formula(inputs, cache)
    np.testing.assert_allclose(at_once[LIVE], wanted[LIVE], atol=3e-5)
    np.testing.assert_allclose(np.concatenate(mixed, axis=1)[LIVE], wanted[LIVE], atol=3e-5)
    assert as_decoded(cache) is cache
    for b in range(B):
        count = T - START[b]
        for kept, x in ((whole.first_keys, inputs[1]), (whole.first_values, inputs[2])):
            np.testing.assert_array_equal(np.asarray(kept)[b].swapaxes(0, 1), x[b, START[b] : START[b] + 2])
        # Places that no token has are empty.
        assert not np.asarray(whole.keys.outliers)[b, 0, max(0, count - recent) :].any()


def test_queries_alone_see_what_the_newest_token_sees(rng: np.random.Generator) -> None:
    inputs, cache = draw(rng), factory(recent=R)
    mixed, whole = feed(empty(cache), *inputs, POSITIONS)
    last = jax.jit(lambda cache, *new: cache.attend(*new, ROPE, SETTINGS))(whole, inputs[0][:, -1:], POSITIONS[:, -1:])
    np.testing.assert_allclose(last[:, 0], mixed[:, -1], atol=1e-6)


@pytest.mark.parametrize(("bits", "most"), [(4, 0.30), (3, 0.24), (2, 0.18)])
def test_bytes_per_token(bits: Any, most: float) -> None:
    shape = 0, 1, 8192, 8, 128, jnp.zeros(1, jnp.int32), jnp.bfloat16

    def of(x: Any) -> Any:
        return jax.ShapeDtypeStruct((1, *x), jnp.float32)

    tables = Levels(of((2**bits,)), of((8, 128)), of((8, 128)), of((2**bits,)))

    def size(create: Any, *args: Any) -> int:
        return sum(each.size * each.dtype.itemsize for each in jax.tree.leaves(jax.eval_shape(create, *args)))

    ours = size(lambda tables: KVQuant(bits, levels=tables).create(*shape), tables)
    assert most - 0.02 < ours / size(lambda: DenseCache.create(*shape)) <= most


def test_a_step_copies_no_slab() -> None:
    # In float32: XLA on a CPU updates bfloat16, whatever holds it, in a copy.
    start = jnp.zeros(2, jnp.int32)
    cache = KVQuant(4, 0.1, levels=levels(4)).create(0, 2, 1000, HKV, D, start, jnp.float32)
    new = [jax.ShapeDtypeStruct((2, 1, n, D), jnp.float32) for n in (H, HKV, HKV)]
    step = jax.jit(lambda cache, *new: append_attend(cache, *new, None), donate_argnums=0)
    text = step.lower(cache, *new, jax.ShapeDtypeStruct((2, 1), jnp.int32)).compile().as_text()
    assert text.split("\n", 1)[0].count("may-alias") == len(jax.tree.leaves(cache))
    for slab in jax.tree.leaves((cache.keys, cache.values)):
        shape = f"{dict(uint8='u8', float32='f32')[slab.dtype.name]}[{','.join(map(str, slab.shape))}]"
        made = re.findall(rf" = {re.escape(shape)}\S* ([\w-]+)\(", text)
        # What is neither a name for what is there nor a write in place would be a copy.
        assert set(made) <= {"dynamic-update-slice", "parameter", "get-tuple-element", "fusion"}, (shape, made)
    # No array of floats is as large as the keys or the values.
    sizes = [np.prod([int(n) for n in each.split(",")]) for each in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(sizes) < 2 * HKV * D * 872


def test_a_model_generates_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, tmp_path, 2)
    model, prompt = a4.models.load("tiny"), "Once upon a time, there was a little girl named Lily."
    assert isinstance(model, Llama)
    settings = KVQuant(4, recent=8, weighting="none")
    cache = a4.calibrate_cache(model, settings, a4.data.stories()[:3000], tokens=256, seqlen=128)
    dense = a4.generate(model, prompt, max_new_tokens=40)
    assert dense[:60] == a4.generate(model, prompt, max_new_tokens=40, cache=cache)[:60]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 5}, "bits is 5, and 4, 3 or 2 is needed; leave the cache out"),
        ({"outliers": 0.7}, "outliers is 0.7, and a share from 0 to 0.5 is needed; take 0.01"),
        ({"sinks": -1}, "sinks is -1, and at least 0 is needed"),
        ({"weighting": "hessian"}, 'weighting is \'hessian\', and "fisher" or "none" is needed'),
    ],
)
def test_other_settings_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KVQuant(**fields)
