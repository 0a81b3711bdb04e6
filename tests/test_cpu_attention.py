"""The C++ step of a dense cache: against float64 and XLA, and what it declines."""

from __future__ import annotations

import ctypes
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_contract import Case, Inputs, cache, draw, factors_of, loop, table, token, wanted

from any4_jax.kv_cache import PLAIN, AttentionSettings
from any4_jax.kv_cache.plain import plain_step
from any4_jax.kv_cache.step import BACKENDS
from any4_jax.models.rope import Rope
from cuda_ffi import attention_cpu, threads

CASES = [
    dataclasses.replace(case, dtype=(np.float32, jnp.bfloat16)[i % 2])
    for i, case in enumerate(case for case in table()[::2] if case.rows < 8)
]


def attend(case: Case, inputs: Inputs, isa: str = "auto") -> list[np.ndarray]:
    settings = case.settings
    scale = case.size**-0.5 if settings.scale is None else settings.scale
    limits = dict(scale=scale, softcap=settings.softcap, window=settings.window, isa=isa)
    factors = factors_of(case, inputs)
    # With an axis for the one token.
    queries, new_keys, new_values, positions = (each[:, None] for each in (*inputs[:3], inputs.positions))
    operands = map(jnp.asarray, (queries, new_keys, new_values, *inputs[3:6], positions, inputs.start))
    turned = None if factors is None else tuple(jnp.asarray(each[:, None]) for each in factors)
    mixed, *held = map(np.asarray, attention_cpu.attend(*operands, turned, **limits))
    return [mixed[:, 0], *held]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step(case: Case, library: ctypes.CDLL) -> None:
    inputs = draw(case)
    want = wanted(case, inputs)
    # Of float32 the error is that of a sum; keys in bfloat16 may be rounded from a rotation that is.
    eps = float(jnp.finfo(case.dtype).eps) if case.dtype == jnp.bfloat16 else 1e-5
    for isa in ("portable", "avx2", "avx512"):
        if library.any4_cpu_has_isa(isa.encode()):
            *got, length = attend(case, inputs, isa)
            for ours, theirs in zip(got, want, strict=True):
                np.testing.assert_allclose(
                    ours.astype(np.float64), theirs.astype(np.float64), rtol=eps, atol=max(eps / 8, 1e-5), err_msg=isa
                )
            assert length == case.length + 1


def test_threads_change_no_bit(one_thread: None) -> None:
    case = Case(slots=4096, length=4000, rows=2, dtype=np.float32)
    alone = attend(case, draw(case))[0]
    threads.limit_threads(0)
    np.testing.assert_array_equal(attend(case, draw(case))[0], alone)


@pytest.mark.usefixtures("library")
def test_a_row_that_sees_nothing_gets_zeros() -> None:
    case = Case(rows=2, dtype=np.float32)
    mixed = attend(case, draw(case)._replace(positions=np.asarray([-201, 193], np.int32)))[0]
    assert not mixed[0].any() and mixed[1].any()


# Rows, key heads, heads on each, channels, slots, slots in use, new tokens, settings: blocks that end unevenly, scores
# that end within a register or with the cache, windows that some of a block have left, and parts of slots.
SEVERAL = [
    (1, 3, 3, 64, 192, 0, 32, PLAIN),
    (2, 1, 5, 16, 37, 20, 17, AttentionSettings(scale=0.3, softcap=2.0)),
    (2, 2, 1, 80, 320, 290, 11, AttentionSettings(window=5)),
    (1, 1, 2, 32, 1100, 1050, 8, AttentionSettings(window=600)),
]


@pytest.mark.parametrize("number", range(len(SEVERAL)))
def test_several_tokens_are_those_of_xla(number: int, library: ctypes.CDLL) -> None:
    rows, groups, shared, size, slots, used, tokens, settings = SEVERAL[number]
    dtype = (jnp.float32, jnp.bfloat16)[number % 2]
    rng = np.random.default_rng(number)
    shapes = [(rows, tokens, heads, size) for heads in (groups * shared, groups, groups)]
    shapes += [(rows * groups, size, slots), (rows * groups, slots, size)]
    new = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    # The second row has padding, before it or among the new tokens.
    start = jnp.asarray([0, 3][:rows], jnp.int32)
    positions = used + jnp.arange(tokens, dtype=jnp.int32) - start[:, None]
    operands = *new, jnp.int32(used), positions, start
    rope, limits = Rope(size, 100.0), dict(softcap=settings.softcap, window=settings.window)
    want = plain_step(*operands, rope=rope, settings=settings)
    loose = 1e-5 if dtype == jnp.float32 else 0.02
    for isa in ("portable", "avx2", "avx512"):
        if library.any4_cpu_has_isa(isa.encode()):
            scale = settings.scale or size**-0.5
            got = attention_cpu.attend(*operands, rope.factors(positions), scale=scale, isa=isa, **limits)
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(
                    np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=loose, atol=loose, err_msg=isa
                )


@pytest.mark.usefixtures("library")
def test_a_loop_equals_xla_and_copies_no_cache() -> None:
    ours, theirs = (loop(backend)(*token(), cache()) for backend in ("cpu", "xla"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0.02, atol=0.02)
    text = loop(None).lower(*token(), cache()).compile().as_text()
    assert attention_cpu.TARGET in text
    assert re.findall(r"= bf16\[4,(?:64,64)\]\S* copy\(", text) == []


@pytest.mark.usefixtures("library")
def test_the_handler_refuses_what_does_not_fit() -> None:
    case = Case(dtype=np.float32)
    inputs = draw(case)
    with pytest.raises(Exception, match="the shapes of its operands don't fit together"):
        attend(case, inputs._replace(values=inputs.values[:, :8]))
    with pytest.raises(Exception, match="a row starts before the first slot"):
        attend(case, inputs._replace(start=-inputs.start - 1))
    with pytest.raises(Exception, match="got isa=mmx, which this processor doesn't have"):
        attend(case, inputs, "mmx")


def reason(queries: Any, keys: Any, held: Any, platform: str = "cpu") -> str | None:
    option = next(option for option in BACKENDS.options if option.name == "cpu")
    return option.supports(queries, keys, held.keys, held.values, PLAIN, platform)


@pytest.mark.usefixtures("library")
def test_what_it_declines() -> None:
    queries, keys, _ = token()
    assert reason(queries, keys, cache()) is None
    assert reason(queries, keys, cache(), "cuda") == "it runs on cpu, not on cuda"
    assert "differ, bfloat16 and float32" in str(reason(queries, keys, cache(dtype=jnp.float32)))
    odd = [each[..., :24] for each in (queries, keys)]
    assert reason(*odd, cache()) == "a head has 24 channels, which is no multiple of 16 up to 256"
