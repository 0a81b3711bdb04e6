"""The step of attention by the CUDA kernel, as it is lowered: what it takes and declines. No GPU is needed."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cuda_attention import cache, loop, token

from any4_jax.kv_cache import PLAIN, AttentionSettings, DenseCache
from any4_jax.kv_cache.step import BACKENDS
from any4_jax.models.rope import Rope
from cuda_ffi import attention, registration


@pytest.fixture
def as_if_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose library isn't called, only lowered to."""
    monkeypatch.setattr(registration, "_register", lambda kind: object())


def lowered(function: Any, *arguments: Any) -> str:
    """StableHLO for an NVIDIA GPU, which this machine needn't have."""
    checks = [jax.export.DisabledSafetyCheck.custom_call(attention.TARGET)]
    return jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(*arguments).mlir_module()


@pytest.mark.usefixtures("as_if_built")
def test_a_token_is_lowered_to_one_call_and_a_prompt_to_none() -> None:
    text = lowered(loop(None), *token(), cache())
    assert text.count(f"@{attention.TARGET}(") == 1
    assert "stablehlo.dynamic_update_slice" not in text and "stablehlo.dot_general" not in text
    assert text.count("output_operand_alias<") == 3
    prompt = [jnp.concatenate([x, x], axis=1) for x in token()]
    positions = jnp.asarray([[0, 1]] * 2, jnp.int32)
    text = lowered(lambda *new: cache().append_attend(*new, positions, None)[0], *prompt)
    assert f"@{attention.TARGET}(" not in text and "stablehlo.dot_general" in text


@dataclasses.dataclass(frozen=True)
class Interleaved(Rope):
    """It has the factors of its base, and rotates other pairs by them."""

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        cos, sin = (f[:, :, None] for f in self.factors(positions))
        even, odd = x[..., ::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
        return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape).astype(x.dtype)


@pytest.mark.usefixtures("as_if_built")
@pytest.mark.parametrize(("kind", "rotates"), [(Rope, True), (Interleaved, False)])
def test_the_kernel_rotates_by_no_rope_that_rotates_otherwise(kind: type[Rope], rotates: bool) -> None:
    new, held = token(), cache()
    text = lowered(lambda *new: held.append_attend(*new, jnp.zeros((2, 1), jnp.int32), kind(64, 10000.0))[0], *new)
    assert (_operands(text)[-2:] == ["2x32xf32"] * 2) == rotates


@pytest.mark.usefixtures("as_if_built")
@pytest.mark.parametrize("rope", [Rope(64, 10000.0), None], ids=["rope", "no rope"])
def test_positions_broadcast_and_wide_integers_reach_the_kernel_as_it_needs_them(rope: Rope | None) -> None:
    with jax.enable_x64(True):
        held = dataclasses.replace(cache(), length=jnp.int64(3), start=jnp.zeros(2, jnp.int64))
        positions = jnp.full((1, 1), 3, jnp.int64)
        _, wanted = jax.eval_shape(lambda *new: held.append_attend(*new, positions, rope), *token())
        text = lowered(lambda *new: held.append_attend(*new, positions, rope), *token())
    assert wanted.length.dtype == jnp.int64
    assert _operands(text)[5:8] == ["i32", "2xi32", "2xi32"]


def _operands(text: str) -> list[str]:
    """The types of what the one call of the kernel is given."""
    (call,) = (line for line in text.splitlines() if f"@{attention.TARGET}(" in line)
    return re.findall(r"tensor<([^>]*)>", call.rsplit(" : (", 1)[1].split(") -> ")[0])


@pytest.mark.usefixtures("as_if_built")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 3}, "there are 3 new tokens a row, not 1"),
        ({"size": 24}, "a head has 24 channels, which is no multiple of 16 up to 256"),
        ({"size": 272}, "a head has 272 channels, which is no multiple of 16 up to 256"),
        ({"heads": 34}, "17 query heads share a key head, more than 16"),
        ({"slots": 29}, "the cache has 29 slots, which is no multiple of 8"),
        ({"slots": 2**30}, "the cache has 1073741824 slots, more than 1073741823"),
        ({"rows": 2**15}, "32768 rows of 2 key heads are 65536 pairs, more than 65535"),
        ({"dtype": jnp.float32}, "the dtypes of queries and cache differ, bfloat16 and float32"),
        ({"dtype": jnp.float32, "queries": jnp.float32}, "queries and cache are float32, not bfloat16 or float16"),
        ({"platform": "cpu"}, "it runs on cuda, not on cpu"),
        ({}, None),
    ],
)
def test_what_it_declines_it_says(change: dict[str, Any], words: str | None) -> None:
    default = dict(
        rows=2,
        tokens=1,
        size=64,
        heads=8,
        slots=64,
        dtype=jnp.bfloat16,
        queries=jnp.bfloat16,
        platform="cuda",
        groups=2,
    )
    case = default | change
    b, t, h, d, s = case["rows"], case["tokens"], case["groups"], case["size"], case["slots"]
    queries, new = (jax.ShapeDtypeStruct((b, t, n, d), case["queries"]) for n in (case["heads"], h))
    keys, values = (jax.ShapeDtypeStruct(shape, case["dtype"]) for shape in ((b * h, d, s), (b * h, s, d)))
    assert BACKENDS.named("cuda").supports(queries, new, keys, values, PLAIN, case["platform"]) == words


def test_without_the_library_xla_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_register", lambda kind: f"no {kind} library is built")
    assert f"@{attention.TARGET}(" not in lowered(loop(None), *token(), cache())
    with pytest.raises(ValueError, match="backend 'cuda' can't do this: "):
        loop("cuda").lower(*token(), cache())


def by(backend: str, rope: Rope | None, queries: Any, keys: Any, values: Any, held: DenseCache) -> Any:
    positions = (held.length - held.start)[:, None]
    run = functools.partial(BACKENDS.named(backend).run, rope=rope, settings=AttentionSettings(window=5))
    return run(queries, keys, values, held.keys, held.values, held.length, positions, held.start)


@pytest.mark.usefixtures("as_if_built")
@pytest.mark.parametrize("rope", [Rope(64, 10000.0), None], ids=["rope", "no rope"])
def test_vmap_and_derivatives_are_those_of_xla(rope: Rope | None) -> None:
    tokens, held = token(), dataclasses.replace(cache(), length=jnp.int32(3))
    stacked = [jnp.stack([x, 2 * x]) for x in tokens]

    def mapped(backend: str) -> Any:
        return jax.jit(jax.vmap(functools.partial(by, backend, rope), (0, 0, 0, None)))(*stacked, held)

    def gradient(backend: str) -> Any:
        def loss(tokens: list[jax.Array]) -> jax.Array:
            return sum(x.astype(jnp.float32).sum() for x in by(backend, rope, *tokens, held))

        return jax.jit(jax.grad(loss))(tokens)

    for ours, theirs in ((mapped("cuda"), mapped("xla")), (gradient("cuda"), gradient("xla"))):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0.01, atol=0.01)
