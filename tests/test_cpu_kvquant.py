"""The C++ kernel of a KVQuant cache's step: against XLA with each instruction set, and what it declines."""

from __future__ import annotations

import ctypes
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax.kv_cache import PLAIN, AttentionSettings, KVQuant
from any4_jax.kv_cache.kvquant_step import BACKENDS, kernel
from any4_jax.kv_cache.one_token import step
from any4_jax.models.rope import Rope
from any4_jax.models.rope_scaling import DynamicScaling, YarnScaling
from cuda_ffi import kvquant_attention_cpu, registration

START = (0, 3)
SLOTS = 620
YARN = YarnScaling(factor=4.0, original_max_position_embeddings=128, attention_factor=1.2)
BY_LENGTH = DynamicScaling(factor=4.0, original_max_position_embeddings=128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Two rows of Hkv `groups` of `shared` heads."""

    factory: KVQuant = KVQuant(4, recent=16)
    groups: int = 2
    shared: int = 2
    size: int = 64
    rope: Rope | None = Rope(64, 10000.0)
    settings: AttentionSettings = PLAIN
    dtype: Any = jnp.float32


CASES = [
    Case(rope=Rope(64, 10000.0, YARN), settings=AttentionSettings(scale=0.3)),
    Case(factory=KVQuant(3, recent=0, sinks=2, outliers=0.05), size=32, groups=1, shared=3, rope=Rope(32, 10000.0)),
    Case(factory=KVQuant(2, sinks=0), size=128, groups=4, rope=Rope(128, 500000.0), dtype=jnp.bfloat16),
    Case(factory=KVQuant(3, recent=16, outliers=0.0), rope=None, settings=AttentionSettings(window=150, softcap=3.0)),
]


def filled(case: Case) -> Any:
    """A cache of random numbers, its outliers in different channels."""
    rng, channels = np.random.default_rng(0), case.groups * case.size
    start = jnp.asarray(START, jnp.int32)
    factory = case.factory.stand_in(1, case.groups, case.size)
    empty = factory.create(0, 2, SLOTS, case.groups, case.size, start, case.dtype)

    def draw(path: Any, leaf: jax.Array) -> jax.Array:
        names = [part.name for part in path if isinstance(part, jax.tree_util.GetAttrKey)]
        if "channels" in names:
            order = rng.random((*leaf.shape[:-1], channels)).argsort(axis=-1)
            return jnp.asarray(order[..., : leaf.shape[-1]], leaf.dtype)
        if leaf.dtype == jnp.uint8:
            return jnp.asarray(rng.integers(0, 256, leaf.shape), jnp.uint8)
        if names[-1] in ("length", "start") or names == ["levels", "keys"] or names == ["levels", "values"]:
            return leaf
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, empty)


def token(case: Case, tokens: int = 1) -> list[jax.Array]:
    rng, heads = np.random.default_rng(1), (case.groups * case.shared, case.groups, case.groups)
    return [jnp.asarray(rng.normal(size=(2, tokens, n, case.size)), case.dtype) for n in heads]


def stepping(case: Case, backend: str) -> Any:
    def run(held: Any, *new: jax.Array) -> Any:
        positions = (held.length - held.start)[:, None]
        return step(held, *new, positions, rope=case.rope, settings=case.settings, backend=backend)

    return jax.jit(run, donate_argnums=0).lower(filled(case), *token(case)).compile()


@pytest.mark.parametrize("number", range(len(CASES)))
def test_attention_is_that_of_xla(number: int, library: ctypes.CDLL) -> None:
    case = CASES[number]
    plain, full, (queries, *new) = stepping(case, "xla"), filled(case), token(case)
    loose = 1e-5 if case.dtype == jnp.float32 else 0.01
    for length in (3, 16, 258, 619):
        held = dataclasses.replace(jax.tree.map(jnp.array, full), length=jnp.int32(length))
        want, held = plain(held, queries, *new)
        positions = length - jnp.asarray(START, jnp.int32)[:, None]
        for isa in ("portable", "avx2", "avx512"):
            if library.any4_cpu_has_isa(isa.encode()):
                got = kernel("cpu", queries, positions, held, rope=case.rope, settings=case.settings, isa=isa)
                pair = (np.asarray(x, np.float32) for x in (got, want))
                np.testing.assert_allclose(*pair, rtol=loose, atol=loose, err_msg=f"{isa}, {length}")


@pytest.mark.usefixtures("library")
def test_a_step_puts_the_token_into_the_cache_in_place() -> None:
    ours, theirs = (stepping(CASES[0], backend) for backend in ("cpu", "xla"))
    full = dataclasses.replace(filled(CASES[0]), length=jnp.int32(300))
    (got, one), (want, other) = (run(jax.tree.map(jnp.array, full), *token(CASES[0])) for run in (ours, theirs))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    text = ours.as_text()
    assert kvquant_attention_cpu.TARGET in text and " dot(" not in text
    for leaf in jax.tree.leaves((full.keys, full.values)):
        kind = {"uint8": "u8", "uint16": "u16", "float32": "f32"}[leaf.dtype.name]
        assert re.findall(rf"= {kind}\[{','.join(map(str, leaf.shape))}\]\S* copy\(", text) == []


@pytest.mark.usefixtures("library")
def test_the_handler_refuses_what_does_not_fit() -> None:
    case = CASES[0]
    cache, (queries, *_), at = filled(case), token(case), jnp.full((2, 1), SLOTS + 16)
    for changed, positions, words in (
        (cache, at, "a position is beyond what the cache has room for"),
        (dataclasses.replace(cache, first_keys=cache.first_keys[:, :1]), at, "the shapes of its operands don't fit"),
        (dataclasses.replace(cache, bits=3), at, "need 4, 3 or 2 bits|don't fit together"),
    ):
        with pytest.raises(Exception, match=words):
            kernel("cpu", queries, positions, changed, rope=case.rope, settings=PLAIN)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 3}, "there are 3 new tokens a row, not 1"),
        ({"size": 48}, "a head has 48 channels, which is no multiple of 32 up to 256"),
        ({"queries": jnp.bfloat16}, "the dtypes of queries and cache differ, bfloat16 and float32"),
        ({"rope": Rope(64, 1e4, BY_LENGTH)}, "the rope's angles aren't proportional to the position"),
        ({"platform": "cuda"}, "it runs on cpu, not on cuda"),
        ({"rope": None}, None),
    ],
)
def test_what_it_declines_it_says(change: dict[str, Any], words: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_register", lambda kind: object())
    case: dict[str, Any] = dict(tokens=1, size=64, queries=jnp.float32, rope=CASES[0].rope, platform="cpu") | change
    held = jax.eval_shape(lambda: filled(Case(size=case["size"])))
    new = [jax.ShapeDtypeStruct((2, case["tokens"], n, case["size"]), case["queries"]) for n in (4, 2)]
    assert BACKENDS.named("cpu").supports(held, *new, case["rope"], PLAIN, case["platform"]) == words
