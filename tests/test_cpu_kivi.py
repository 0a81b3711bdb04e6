"""The C++ kernel of a KIVI cache's step: against float64 and XLA, and what it declines."""

from __future__ import annotations

import ctypes
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kivi_contract import Case, draw, factors_of, table, turned, wanted

from any4_jax.kv_cache import PLAIN, AttentionSettings, Kivi, kivi_cpu
from any4_jax.kv_cache.kivi_step import BACKENDS
from any4_jax.kv_cache.one_token import step
from any4_jax.models.rope import Rope
from cuda_ffi import kivi_attention_cpu, registration, threads
from cuda_ffi.kivi_attention import Held

CASES = [
    *(case for case in table()[::3] if case.dtype == jnp.bfloat16 and case.rows < 8),
    *(Case(size=d, group_size=16, residual=48, key_bits=b, value_bits=6 - b) for d in (32, 64, 256) for b in (4, 2)),
    Case(size=64, group_size=192, residual=192, positions=384, length=390),
]


def poisoned(case: Case, held: Held, positions: np.ndarray) -> Held:
    """The cache with NaN for what no query sees."""
    new = Held(*(np.array(each) for each in held))
    for b, p in enumerate(positions):
        for each in (new.key_steps, new.key_lowest):
            each[b, ..., max(p - p % case.residual, 0) // case.group_size :] = np.nan
        for each in (new.value_steps, new.value_lowest):
            each[b, :, max(p - case.residual + 1, 0) :] = np.nan
        for each in (new.keys, new.values):
            each[b, :, max(p + 1, 0) :] = np.nan
    return new


def attend(case: Case, queries: Any, held: Held, positions: np.ndarray, isa: str = "auto") -> np.ndarray:
    settings = case.settings
    mixed = kivi_attention_cpu.attend(
        jnp.asarray(queries),
        Held(*map(jnp.asarray, held)),
        jnp.asarray(positions),
        group_size=case.group_size,
        scale=case.size**-0.5 if settings.scale is None else settings.scale,
        softcap=settings.softcap,
        window=settings.window,
        isa=isa,
    )
    return np.asarray(mixed, np.float64)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_step(number: int, library: ctypes.CDLL) -> None:
    # Half of the cases in each dtype.
    case = dataclasses.replace(CASES[number], dtype=(np.float32, jnp.bfloat16)[number % 2])
    fresh, before, positions, _ = draw(case)
    mixed, held = wanted(case, fresh, before, positions)
    held, queries = poisoned(case, held, positions), turned(fresh[0], factors_of(case, positions))
    # Numbers of codes aren't rounded here, and are there.
    loose = 1e-5 if case.dtype == np.float32 else 0.01
    for isa in ("portable", "avx2", "avx512"):
        if library.any4_cpu_has_isa(isa.encode()):
            got = attend(case, queries, held, positions, isa)
            np.testing.assert_allclose(got, mixed, rtol=loose, atol=loose, err_msg=isa)


def test_threads_change_no_bit(one_thread: None) -> None:
    case = Case(positions=2560, length=2600, rows=2, dtype=np.float32)
    fresh, held, positions, _ = draw(case)
    alone = attend(case, fresh[0], held, positions)
    threads.limit_threads(0)
    np.testing.assert_array_equal(attend(case, fresh[0], held, positions), alone)


@pytest.mark.usefixtures("library")
def test_the_handler_refuses_what_does_not_fit() -> None:
    case = Case(dtype=np.float32)
    fresh, held, positions, _ = draw(case)
    with pytest.raises(Exception, match="a position is beyond what the cache has room for"):
        attend(case, fresh[0], held, positions + 512)
    with pytest.raises(Exception, match="the shapes of its operands don't fit together"):
        attend(case, fresh[0], held._replace(key_lowest=held.key_lowest[:, :1]), positions)
    with pytest.raises(Exception, match="got isa=mmx, which this processor doesn't have"):
        attend(case, fresh[0], held, positions, "mmx")


FACTORY = Kivi(4, value_bits=2, residual=64)
ROPE = Rope(64, 10000.0)


def token(tokens: int = 1, heads: int = 4, size: int = 64, dtype: Any = jnp.float32) -> list[jax.Array]:
    shapes = [(2, tokens, n, size) for n in (heads, 2, 2)]
    return [jax.random.normal(jax.random.key(n), shape, dtype) for n, shape in enumerate(shapes)]


def cache(factory: Kivi = FACTORY, size: int = 64, dtype: Any = jnp.float32) -> Any:
    return factory.create(0, 2, 256, 2, size, jnp.asarray([0, 3], jnp.int32), dtype)


def test_steps_equal_those_of_xla_and_copy_no_cache(library: ctypes.CDLL) -> None:
    settings = AttentionSettings(window=150, softcap=3.0)

    def stepping(backend: str) -> Any:
        def run(held: Any, *new: jax.Array) -> Any:
            positions = (held.length - held.start)[:, None]
            return step(held, *new, positions, rope=ROPE, settings=settings, backend=backend)

        return jax.jit(run, donate_argnums=0).lower(cache(), *token()).compile()

    rng = np.random.default_rng(0)

    def filled(leaf: jax.Array) -> jax.Array:
        kind = {"uint8": lambda: rng.integers(0, 256, leaf.shape), "float32": lambda: rng.normal(size=leaf.shape)}
        return jnp.asarray(kind.get(leaf.dtype.name, lambda: leaf)(), leaf.dtype)

    full, ours, theirs = jax.tree.map(filled, cache()), stepping("cpu"), stepping("xla")
    for length in (3, 63, 66, 127, 191, 194, 255):
        held = dataclasses.replace(full, length=jnp.int32(length))
        (got, one), (want, other) = (run(jax.tree.map(jnp.array, held), *token()) for run in (ours, theirs))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)
    text = ours.as_text()
    assert kivi_attention_cpu.TARGET in text and " dot(" not in text
    for leaf in jax.tree.leaves((cache().keys, cache().values)):
        kind = {"uint8": "u8", "float32": "f32"}[leaf.dtype.name]
        assert re.findall(rf"= {kind}\[{','.join(map(str, leaf.shape))}\]\S* copy\(", text) == []


@pytest.mark.usefixtures("library")
def test_vmap_and_derivatives_are_those_of_xla() -> None:
    tokens, held = token(), dataclasses.replace(cache(), length=jnp.int32(3))
    positions = jnp.asarray([[3], [0]], jnp.int32)

    def by(backend: str, *tokens: jax.Array) -> jax.Array:
        return BACKENDS.named(backend).run(held, *tokens, positions, rope=ROPE, settings=PLAIN)[0]

    stacked = [jnp.stack([x, 2 * x]) for x in tokens]
    ours, theirs = (jax.jit(jax.vmap(lambda *new, b=b: by(b, *new)))(*stacked) for b in ("cpu", "xla"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    gradient = str(jax.make_jaxpr(jax.grad(lambda *tokens: by("cpu", *tokens).sum(), (0, 1, 2)))(*tokens))
    assert "dot_general" in gradient and "ffi_call" not in gradient


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 3}, "there are 3 new tokens a row, not 1"),
        ({"size": 96}, "a head has 96 channels, not 32, 64, 128 or 256"),
        ({"factory": Kivi(group_size=24, residual=48)}, "24 numbers share a step, which is no multiple of 16"),
        (
            {"factory": Kivi(group_size=48, residual=48)},
            "48 numbers share a step, which doesn't divide the 64 channels",
        ),
        ({"factory": Kivi(rotated=False)}, "the cache holds keys before their rotation"),
        ({"queries": jnp.bfloat16}, "the dtypes of queries and cache differ, bfloat16 and float32"),
        ({"dtype": jnp.float16, "queries": jnp.float16}, "queries and cache are float16, not float32 or bfloat16"),
        ({"platform": "cuda"}, "it runs on cpu, not on cuda"),
        ({"factory": Kivi(2, group_size=128)}, None),
    ],
)
def test_what_it_declines_it_says(change: dict[str, Any], words: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_register", lambda kind: object())
    default = dict(tokens=1, size=64, factory=FACTORY, dtype=jnp.float32, queries=jnp.float32, platform="cpu")
    case: dict[str, Any] = default | change
    new = [jax.ShapeDtypeStruct((2, case["tokens"], n, case["size"]), case["queries"]) for n in (4, 2)]
    held = jax.eval_shape(lambda: cache(case["factory"], case["size"], case["dtype"]))
    said = kivi_cpu.CPU.supports(held, *new, PLAIN, case["platform"])
    assert (said is None) if words is None else said.startswith(words)
