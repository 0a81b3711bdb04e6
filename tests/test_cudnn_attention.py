"""The step of an empty cache by cuDNN: on a GPU against XLA, elsewhere what it declines and its rolled rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax.kv_cache import PLAIN, AttentionSettings, DenseCache, attention, cudnn
from any4_jax.kv_cache.step import BACKENDS, step
from any4_jax.models.rope import Rope

gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")


def prompt(rows: int, tokens: int, heads: int, groups: int, size: int, dtype: Any = jnp.bfloat16) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(n), (rows, tokens, n, size), dtype) for n in (heads, groups, groups)]


@functools.partial(jax.jit, static_argnames=("settings", "backend"))
def run(queries: Any, keys: Any, values: Any, start: Any, settings: AttentionSettings, backend: str | None) -> Any:
    rows, tokens, groups, size = keys.shape
    positions = jnp.arange(tokens, dtype=jnp.int32)[None] - start[:, None]
    cache = DenseCache.create(0, rows, tokens + 64, groups, size, start, keys.dtype)
    held = cache.keys, cache.values, cache.length
    arrays = queries, keys, values, *held, positions, start
    return step(*arrays, rope=Rope(size, 10000.0), settings=settings, backend=backend)


def check(got: Any, wanted: Any, start: np.ndarray, atol: float) -> None:
    """The tokens of each row, and the cache bit for bit."""
    assert np.isfinite(np.asarray(got[0], np.float32)).all()
    for b, first in enumerate(start):
        ours, theirs = (np.asarray(mixed[b, first:], np.float32) for mixed in (got[0], wanted[0]))
        np.testing.assert_allclose(ours, theirs, atol=atol, rtol=0.02)
    for ours, theirs in zip(got[1:], wanted[1:], strict=True):
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))


@gpu
@pytest.mark.parametrize("settings", [PLAIN, AttentionSettings(scale=0.1), AttentionSettings(window=300)], ids=str)
@pytest.mark.parametrize("start", [(0,), (31,), (0, 100)], ids=str)
def test_a_prompt_equals_xla(start: tuple[int, ...], settings: AttentionSettings) -> None:
    first = np.asarray(start, np.int32)
    inputs = prompt(len(start), 1024, 32, 8, 128)
    check(run(*inputs, first, settings, None), run(*inputs, first, settings, "xla"), first, 0.02)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The formula instead of cuDNN: rows without their padding, under the causal mask alone."""

    def fused(queries: Any, keys: Any, values: Any, *, settings: AttentionSettings) -> jax.Array:
        rows, tokens, groups, size = keys.shape
        positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (rows, tokens))
        slabs = [x.transpose(0, 2, 1, 3).reshape(rows * groups, tokens, size) for x in (keys, values)]
        nothing = jnp.zeros(rows, jnp.int32)
        return attention(queries, slabs[0].transpose(0, 2, 1), slabs[1], positions, nothing, settings)

    monkeypatch.setattr(cudnn, "_fused_attention", fused)
    cudnn._fused.cache_clear()
    yield
    cudnn._fused.cache_clear()


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("settings", [PLAIN, AttentionSettings(window=5)], ids=str)
def test_rows_are_rolled_to_their_first_token_and_later_parts_see_earlier_ones(settings: AttentionSettings) -> None:
    start, inputs, rope = np.asarray([0, 7, 3], np.int32), prompt(3, 16, 6, 2, 8, jnp.float32), Rope(8, 10000.0)
    fused, plain = (
        jax.jit(functools.partial(BACKENDS.named(name).run, rope=rope, settings=settings)) for name in ("cudnn", "xla")
    )
    cache = DenseCache.create(0, 3, 80, 2, 8, start, jnp.float32)
    held = cache.keys, cache.values, cache.length
    for first in (0, 16):
        positions = first + jnp.arange(16, dtype=jnp.int32)[None] - start[:, None]
        got, wanted = (step(*inputs, *held, positions, start) for step in (fused, plain))
        check(got, wanted, start if first == 0 else np.zeros_like(start), 1e-5)
        held = got[1:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"platform": "cpu"}, "it runs on cuda, not on cpu"),
        ({"settings": AttentionSettings(softcap=2.0)}, "scores have a softcap"),
        ({"dtype": jnp.float32}, "queries and cache are float32, not bfloat16 or float16 alone"),
        ({"held": jnp.float32}, "queries and cache are bfloat16 and float32, not bfloat16 or float16 alone"),
        ({"tokens": 64}, "the scores are few enough for XLA to compute them at once"),
    ],
)
def test_what_it_declines_it_says(change: dict[str, Any], words: str) -> None:
    default = dict(tokens=2048, dtype=jnp.bfloat16, held=None, settings=PLAIN, platform="cuda")
    case = default | change
    held = case["held"] or case["dtype"]
    queries, new = (jax.ShapeDtypeStruct((1, case["tokens"], n, 64), case["dtype"]) for n in (8, 2))
    keys, values = (jax.ShapeDtypeStruct(shape, held) for shape in ((2, 64, 4096), (2, 4096, 64)))
    assert BACKENDS.named("cudnn").supports(queries, new, keys, values, case["settings"], case["platform"]) == words


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="needs a machine without cuDNN")
def test_without_cudnn_xla_does_it() -> None:
    queries, new = (jax.ShapeDtypeStruct((1, 2048, n, 64), jnp.bfloat16) for n in (8, 2))
    keys, values = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 64, 4096), (2, 4096, 64)))
    reason = BACKENDS.named("cudnn").supports(queries, new, keys, values, PLAIN, "cuda")
    assert reason is not None and reason.startswith("jax says: ")
    start = jnp.zeros(1, jnp.int32)
    lowered = jax.export.export(run, platforms=["cuda"])(queries, new, new, start, PLAIN, None)
    assert "__cudnn" not in lowered.mlir_module()
