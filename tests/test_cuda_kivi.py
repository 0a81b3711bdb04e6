"""The CUDA step of a KIVI cache: on a GPU against float64 and XLA, elsewhere how it is lowered and what it declines."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax.kv_cache import PLAIN, AttentionSettings, Kivi
from any4_jax.kv_cache.kivi_step import BACKENDS, step
from any4_jax.models.rope import Rope
from cuda_ffi import kivi_attention, registration
from cuda_ffi.kivi_attention import Held

why_not = registration.why_not("cuda")
gpu = pytest.mark.skipif(jax.default_backend() != "gpu" or why_not is not None, reason="needs an NVIDIA GPU")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """B rows, Hkv groups of `shared` heads, D channels, R exact tokens; the new token's slot is `length`."""

    rows: int = 1
    groups: int = 2
    shared: int = 4
    size: int = 128
    positions: int = 512
    residual: int = 128
    group_size: int = 32
    key_bits: int = 4
    value_bits: int = 4
    length: int = 400
    start: tuple[int, ...] = (0, 7, 131)
    settings: AttentionSettings = PLAIN
    dtype: Any = jnp.bfloat16
    rotates: bool = True


def table() -> list[Case]:
    """Around one case every number of heads, size, width, length at the edges of tiles and flushes, and setting."""
    both = ((4, 4), (2, 2), (4, 2), (2, 4))
    cases = [
        Case(size=d, key_bits=k, value_bits=v, group_size=g, rows=3)
        for d in (64, 128)
        for k, v in both
        for g in (32, 64, 128)
    ]
    cases += [Case(shared=g) for g in (1, 2, 3, 7, 8)]
    cases += [Case(length=n) for n in (0, 1, 63, 64, 126, 127, 128, 129, 191, 255, 256, 257, 383, 384, 511, 512)]
    cases += [Case(residual=64, length=n, rows=3) for n in (194, 258, 319, 320)]
    cases += [Case(positions=8192 + 64 * r, length=8300, rows=r) for r in (1, 3)]
    cases += [Case(positions=2560, length=2600, rows=r, groups=g, start=(5,) * r) for r, g in ((8, 8), (40, 8), (2, 1))]
    settings = [
        {"window": 1},
        {"window": 33},
        {"window": 130},
        {"window": 200},
        {"softcap": 2.0},
        {"scale": 1.0, "softcap": 5.0},
    ]
    cases += [Case(settings=AttentionSettings(**each), rows=3, length=n) for each in settings for n in (400, 511)]
    cases += [Case(dtype=jnp.float16, size=d, key_bits=k, value_bits=k) for d in (64, 128) for k in (2, 4)]
    return [*cases, Case(rotates=False), Case(start=(400,)), Case(start=(401,)), Case(start=(270,))]


def encoded(x: np.ndarray, bits: int, group_size: int, dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed codes, steps and lowest values of x [N, M] in groups of the last axis."""
    x = x.astype(np.float32).reshape(len(x), -1, min(group_size, x.shape[-1]))
    low = x.min(axis=-1)
    steps = ((x.max(axis=-1) - low) / np.float32(2**bits - 1)).astype(dtype)
    codes = np.clip(np.rint((x - low[..., None]) / steps.astype(np.float32)[..., None]), 0, 2**bits - 1)
    return packed(codes.astype(np.uint8).reshape(len(x), -1), bits), steps, low.astype(dtype)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    parts = codes.reshape(*codes.shape[:-1], -1, 8 // bits)
    return sum(parts[..., i] << (bits * i) for i in range(8 // bits)).astype(np.uint8)


def decoded(codes: np.ndarray, steps: np.ndarray, lowest: np.ndarray, bits: int, dtype: Any) -> np.ndarray:
    """Float64 numbers, rounded to the dtype."""
    whole = np.stack([codes >> (bits * i) & (2**bits - 1) for i in range(8 // bits)], axis=-1).reshape(
        *codes.shape[:-1], -1
    )
    each = whole.shape[-1] // steps.shape[-1]
    wide = whole * np.repeat(steps.astype(np.float64), each, -1) + np.repeat(lowest.astype(np.float64), each, -1)
    return wide.astype(np.float32).astype(dtype).astype(np.float64)


def draw(case: Case) -> tuple[list[np.ndarray], Held, np.ndarray, np.ndarray]:
    """New queries, keys and values; the cache before them; positions and start."""
    rng = np.random.default_rng(0)
    b, h, d, g, r = case.rows, case.groups, case.size, case.group_size, case.residual
    start = np.asarray(case.start[:b], np.int32)
    count = -(-case.positions // (2 * g)) * 2 * g
    fresh = [rng.normal(size=(b, n, d)).astype(case.dtype) for n in (h * case.shared, h, h)]
    rings = [rng.normal(size=(b, h, r, d)).astype(case.dtype) for _ in range(2)]
    slabs = []
    for shape, bits in (((b, h, d, count), case.key_bits), ((b, h, count, d), case.value_bits)):
        few = (*shape[:3], max(shape[3] // g, 1))
        codes = packed(rng.integers(0, 2**bits, shape).astype(np.uint8), bits)
        slabs += [codes, rng.uniform(0.1, 0.3, few).astype(case.dtype), rng.normal(-1, 0.5, few).astype(case.dtype)]
    return fresh, Held(*rings, *slabs, np.int32(case.length)), (case.length - start).astype(np.int32), start


def factors_of(case: Case, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    angles = positions[:, None] * 10000.0 ** -np.linspace(0, 1, case.size // 2)
    return (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)) if case.rotates else None


def turned(x: np.ndarray, factors: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """x [B, heads, D] rotated in float32 and rounded once."""
    if factors is None:
        return x
    cos, sin = (f[:, None] for f in factors)
    low, high = np.split(x.astype(np.float32), 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def wanted(case: Case, fresh: list[np.ndarray], held: Held, positions: np.ndarray) -> tuple[np.ndarray, Held]:
    """The step in float64; what becomes codes in float32, exactly."""
    factors, r = factors_of(case, positions), case.residual
    queries, new_keys, new_values = turned(fresh[0], factors), turned(fresh[1], factors), fresh[2]
    new = Held(*(np.array(each) for each in held))
    mixed, settings = np.zeros(queries.shape), case.settings
    for b, h in np.ndindex(case.rows, case.groups):
        p = positions[b]
        if p < 0:
            continue
        if p >= r:
            codes = encoded(new.values[b, h, p % r][None], case.value_bits, case.group_size, case.dtype)
            for slab, each in zip((new.value_codes, new.value_steps, new.value_lowest), codes, strict=True):
                slab[b, h, p - r] = each[0]
        new.keys[b, h, p % r], new.values[b, h, p % r] = new_keys[b, h], new_values[b, h]
        slabs = new.key_codes[b, h], new.key_steps[b, h], new.key_lowest[b, h]
        keys = decoded(*slabs, case.key_bits, case.dtype).T
        if (p + 1) % r == 0:
            codes = encoded(new.keys[b, h].T, case.key_bits, case.group_size, case.dtype)
            for slab, each in zip(slabs, codes, strict=True):
                few = each.shape[-1]
                slab[:, p // r * few : (p // r + 1) * few] = each
        slabs = new.value_codes[b, h], new.value_steps[b, h], new.value_lowest[b, h]
        values = decoded(*slabs, case.value_bits, case.dtype)
        keys, values = (np.concatenate([x, np.zeros((r, case.size))])[: p + 1] for x in (keys, values))
        for ring, x, first in ((new.keys, keys, p - p % r), (new.values, values, max(p - r + 1, 0))):
            x[first:] = ring[b, h, np.arange(first, p + 1) % r].astype(np.float64)
        first = 0 if settings.window is None else max(p - settings.window + 1, 0)
        for head in range(h * case.shared, (h + 1) * case.shared):
            scores = keys[first:] @ queries[b, head].astype(np.float64)
            scores *= case.size**-0.5 if settings.scale is None else settings.scale
            if settings.softcap is not None:
                scores = settings.softcap * np.tanh(scores / settings.softcap)
            weights = np.exp(scores - scores.max())
            mixed[b, head] = weights @ values[first:] / weights.sum()
    return mixed, new._replace(length=np.int32(case.length + 1))


@gpu
@pytest.mark.parametrize("case", table(), ids=str)
def test_a_step(case: Case) -> None:
    fresh, held, positions, start = draw(case)
    settings = case.settings
    got, cache = kivi_attention.attend(
        *map(jnp.asarray, fresh),
        Held(*map(jnp.asarray, held)),
        jnp.asarray(positions),
        jnp.asarray(start),
        factors_of(case, positions),
        group_size=case.group_size,
        scale=case.size**-0.5 if settings.scale is None else settings.scale,
        softcap=settings.softcap,
        window=settings.window,
    )
    mixed, new = wanted(case, fresh, held, positions)
    # Half a unit in the last place, and numbers that two roundings take elsewhere than one.
    np.testing.assert_allclose(
        np.asarray(got, np.float64), mixed, rtol=0.51 * float(jnp.finfo(case.dtype).eps), atol=3e-4
    )
    for name, ours, theirs in zip(Held._fields, cache, new, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), err_msg=name)


FACTORY = Kivi(4, value_bits=2, residual=64)
ROPE = Rope(64, 10000.0)


def token(rows: int = 2, heads: int = 8, groups: int = 2, size: int = 64, tokens: int = 1) -> list[jax.Array]:
    shapes = [(rows, tokens, n, size) for n in (heads, groups, groups)]
    return [jax.random.normal(jax.random.key(n), shape, jnp.bfloat16) for n, shape in enumerate(shapes)]


def cache(factory: Kivi = FACTORY, groups: int = 2, size: int = 64, dtype: Any = jnp.bfloat16, slots: int = 256) -> Any:
    return factory.create(0, 2, slots, groups, size, jnp.asarray([0, 3], jnp.int32), dtype)


def loop(backend: str | None, count: int = 140):
    """Steps from a cache that is given away, as decoding runs them; each token's query is the mixture before it."""

    def run(queries: Any, keys: Any, values: Any, held: Any) -> tuple[jax.Array, Any]:
        def one(i: Any, carry: Any) -> Any:
            queries, held = carry
            positions = (held.length - held.start)[:, None]
            new = (x * jnp.cos(i + jnp.arange(64)).astype(x.dtype) for x in (keys, values))
            mixed, held = step(held, queries, *new, positions, rope=ROPE, backend=backend)
            return (mixed + queries).astype(queries.dtype) / 2, held

        return jax.lax.fori_loop(0, count, one, (queries, held))

    return jax.jit(run, donate_argnums=3)


@gpu
def test_a_loop_equals_xla_and_copies_no_cache() -> None:
    ours, theirs = (loop(backend)(*token(), cache()) for backend in (None, "xla"))
    np.testing.assert_allclose(*(np.asarray(x[0], np.float32) for x in (ours, theirs)), rtol=0.03, atol=0.03)
    for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
        # Where XLA rounds a step otherwise, a few codes differ.
        assert (np.asarray(a) == np.asarray(b)).mean() > 0.99
    text = loop(None).lower(*token(), cache()).compile().as_text()
    assert kivi_attention.TARGET in text
    for leaf in jax.tree.leaves((cache().keys, cache().values)):
        kind = {"uint8": "u8", "bfloat16": "bf16"}[leaf.dtype.name]
        assert re.findall(rf"= {kind}\[{','.join(map(str, leaf.shape))}\]\S* copy\(", text) == []


@pytest.fixture
def as_if_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose library isn't called, only lowered to."""
    monkeypatch.setattr(registration, "_register", lambda kind: object())


def lowered(function: Any, *arguments: Any) -> str:
    """StableHLO for an NVIDIA GPU, which this machine needn't have."""
    checks = [jax.export.DisabledSafetyCheck.custom_call(kivi_attention.TARGET)]
    return jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(*arguments).mlir_module()


@pytest.mark.usefixtures("as_if_built")
def test_a_token_is_lowered_to_one_call_in_place_and_a_prompt_to_none() -> None:
    text = lowered(loop(None), *token(), cache())
    assert text.count(f"@{kivi_attention.TARGET}(") == 1
    assert "stablehlo.dynamic_update_slice" not in text and "stablehlo.dot_general" not in text
    assert text.count("output_operand_alias<") == len(Held._fields)
    positions = jnp.asarray([[0, 1]] * 2, jnp.int32)
    text = lowered(lambda *new: cache().append_attend(*new, positions, ROPE)[0], *token(tokens=2))
    assert f"@{kivi_attention.TARGET}(" not in text and "stablehlo.dot_general" in text


@pytest.mark.usefixtures("as_if_built")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 3}, "there are 3 new tokens a row, not 1"),
        ({"size": 96}, "a head has 96 channels, not 64 or 128"),
        ({"heads": 18}, "9 query heads share a key head, more than 8"),
        ({"factory": Kivi(group_size=16, residual=64)}, "16 numbers share a step, not 32, 64 or 128"),
        ({"factory": Kivi(residual=96)}, "the newest 96 tokens are exact, which is no multiple of 64"),
        ({"factory": Kivi(rotated=False)}, "the cache holds keys before their rotation"),
        ({"dtype": jnp.float32}, "the dtypes of queries and cache differ, bfloat16 and float32"),
        ({"dtype": jnp.float32, "queries": jnp.float32}, "queries and cache are float32, not bfloat16 or float16"),
        ({"platform": "cpu"}, "it runs on cuda, not on cpu"),
        ({}, None),
        ({"factory": Kivi(2, group_size=128), "size": 64, "slots": 1}, None),
    ],
)
def test_what_it_declines_it_says(change: dict[str, Any], words: str | None) -> None:
    default = dict(tokens=1, size=128, heads=16, dtype=jnp.bfloat16, queries=jnp.bfloat16, platform="cuda")
    case = default | {"factory": FACTORY, "slots": 200} | change
    queries, new = (
        jax.ShapeDtypeStruct((2, case["tokens"], n, case["size"]), case["queries"]) for n in (case["heads"], 2)
    )
    held = jax.eval_shape(lambda: cache(case["factory"], 2, case["size"], case["dtype"], case["slots"]))
    assert BACKENDS.named("cuda").supports(held, queries, new, PLAIN, case["platform"]) == words


@pytest.mark.usefixtures("as_if_built")
def test_vmap_and_derivatives_are_those_of_xla() -> None:
    tokens, held = token(), dataclasses.replace(cache(), length=jnp.int32(3))
    positions, settings = jnp.asarray([[3], [0]], jnp.int32), AttentionSettings(window=5)

    def by(backend: str, *tokens: jax.Array) -> jax.Array:
        run = BACKENDS.named(backend).run
        return run(held, *tokens, positions, rope=ROPE, settings=settings)[0].astype(jnp.float32)

    stacked = [jnp.stack([x, 2 * x]) for x in tokens]
    ours = jax.jit(jax.vmap(lambda *new: by("cuda", *new)))(*stacked)
    theirs = jnp.stack([jax.jit(lambda *new: by("xla", *new))(*(x[i] for x in stacked)) for i in range(2)])
    np.testing.assert_allclose(ours, theirs, rtol=0.01, atol=0.01)
    gradient = str(jax.make_jaxpr(jax.grad(lambda *tokens: by("cuda", *tokens).sum(), (0, 1, 2)))(*tokens))
    assert "dot_general" in gradient and "ffi_call" not in gradient
