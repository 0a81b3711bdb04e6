"""The two loops of generate: one that stops early, and one of fixed chunks that runs ahead of the host, as on GPUs."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from any4_jax.choice import PLATFORMS
from any4_jax.generate import generate, generate_chunks, generate_tokens, loop
from any4_jax.generate.chunk import Chunk
from any4_jax.generate.sampling import Sampler
from any4_jax.kv_cache import DenseCache, traceable
from any4_jax.models.base import Decoder
from any4_jax.models.llama import Llama
from any4_jax.models.program import Program
from any4_jax.models.tiny import random_llama
from tests.family_goldens import golden

ROWS = [[5, 9, 2], [100, 3, 3, 7, 64, 2, 8], [1]]


@pytest.fixture(scope="module")
def llama() -> Llama:
    """Random weights, with a spread head: the likeliest token varies along a text."""
    model = random_llama()
    model.lm_head.kernel.set_value(model.lm_head.kernel.get_value() * 4)
    return model


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function from whose call on the loop runs as on a GPU; until then it runs as on a CPU, wherever it is."""
    monkeypatch.setattr(loop, "platform_of", lambda *arrays: "cpu")
    return lambda: monkeypatch.setattr(loop, "platform_of", lambda *arrays: "cuda")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The fixed steps of each call of the loop's program, as they are made."""
    made, decode = [], loop._decode

    def watched(program: Any, trips: int | None, *rest: Any) -> Any:
        made.append(trips)
        return decode(program, trips, *rest)

    monkeypatch.setattr(loop, "_decode", watched)
    return made


def test_every_platform_has_its_loop() -> None:
    assert set(loop.RUNS_AHEAD) == set(PLATFORMS) and not loop.RUNS_AHEAD["cpu"]


SAMPLED = {
    "temperature": 1.5,
    "top_k": 40,
    "top_p": 0.95,
    "seed": 3,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
}


@pytest.mark.parametrize(
    "family, lengths, settings",
    [
        ("llama", (3, 7, 1), {"max_new_tokens": 40}),
        ("llama", (30, 9), {"max_new_tokens": 98}),
        ("llama", (3, 7), {"max_new_tokens": 21, "logprobs": 3, "chunk": 5, **SAMPLED}),
        ("opt", (4, 2), {}),
        ("mistral", (4, 2), {"max_new_tokens": 37}),
    ],
    ids=["rows", "full", "all-settings", "positions-full", "window"],
)
def test_both_loops_give_the_same(
    family: str, lengths: tuple[int, ...], settings: dict[str, Any], llama: Llama, on_gpu: Callable[[], None]
) -> None:
    model: Decoder = llama if family == "llama" else golden(family).model()
    last, context = model.config.vocab_size - 1, model.config.max_position_embeddings
    settings = {"max_new_tokens": context - max(lengths)} | settings
    rows = [[(7 * i + 3 * b) % last for i in range(length)] for b, length in enumerate(lengths)]
    free = list(generate_chunks(model, rows, eos=(), **settings))
    # Ids that end the first row in the midst of a chunk, the others elsewhere or not at all.
    texts = [sum((chunk.tokens[b] for chunk in free), []) for b in range(len(rows))]
    ends = [(), texts[0][min(20, len(texts[0]) - 2)], sorted({text[12] for text in texts})]
    wanted = [free, *(list(generate_chunks(model, rows, eos=end, **settings)) for end in ends[1:])]
    assert any("stop" in chunk.finish_reasons for chunk in wanted[1] + wanted[2])
    on_gpu()
    # Surplus steps stay within the positions that the model has: beyond them an embedding gives NaN.
    with jax.debug_nans(True):
        found = [list(generate_chunks(model, rows, eos=end, **settings)) for end in ends]
    for mine, theirs in zip(found, wanted, strict=True):
        assert [_plain(chunk) for chunk in mine] == [_plain(chunk) for chunk in theirs]
        for chunk, same in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(sum(chunk.logprobs, []), sum(same.logprobs, []), atol=1e-4)


def _plain(chunk: Chunk) -> Any:
    return chunk.tokens, chunk.finish_reasons, [[[*each] for each in row] for row in chunk.alternatives]


def test_a_chunk_is_under_way_before_the_last_is_read(
    llama: Llama, on_gpu: Callable[[], None], calls: list[int | None]
) -> None:
    def made_at_each(**settings: Any) -> list[int]:
        calls.clear()
        return [len(calls) for _ in generate_tokens(llama, ROWS, **settings)]

    texts = generate(llama, ROWS, max_new_tokens=33, eos=())
    first, later = ([text[i] for text in texts] for i in (0, 12))
    assert made_at_each(max_new_tokens=40, eos=()) == [0, 1, 2, 3]
    assert made_at_each(max_new_tokens=40, eos=later) == [0, 1]
    assert set(calls) == {None}
    on_gpu()
    # None is made that `max_new_tokens` leaves no token for, and one at most after all rows have ended.
    assert made_at_each(max_new_tokens=40, eos=()) == [0, 2, 3, 3]
    assert made_at_each(max_new_tokens=33, eos=()) == [0, 2, 2]
    assert made_at_each(max_new_tokens=40, eos=later) == [0, 2]
    assert set(calls) == {16}
    assert made_at_each(max_new_tokens=40, eos=first) == [0]
    assert made_at_each(max_new_tokens=1) == [0] and calls == []


def test_all_steps_have_slots(llama: Llama, on_gpu: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    states, decode = [], loop._decode
    monkeypatch.setattr(loop, "_decode", lambda *args: states.append(decode(*args)) or states[-1])
    on_gpu()
    for _ in generate_tokens(llama, ROWS, max_new_tokens=33, chunk=7, eos=()):
        pass
    for cache in states[-1][0].caches:
        assert int(cache.length) == 32 + 35 <= cache.keys.shape[-1]


@pytest.mark.parametrize("ahead", [False, True])
def test_an_abandoned_generation_leaves_nothing(llama: Llama, ahead: bool, on_gpu: Callable[[], None]) -> None:
    wanted = generate(llama, ROWS, max_new_tokens=40, eos=())
    if ahead:
        on_gpu()
    gc.collect()
    before = len(jax.live_arrays())
    for taken in range(3):
        chunks: Iterator[Any] = generate_tokens(llama, ROWS, max_new_tokens=40, eos=())
        for _ in range(taken):
            next(chunks)
        del chunks
    gc.collect()
    assert len(jax.live_arrays()) == before
    assert generate(llama, ROWS, max_new_tokens=40, eos=()) == wanted


@pytest.mark.parametrize("trips", [None, 16])
def test_the_compiler_knows_the_steps_of_a_fixed_chunk(llama: Llama, trips: int | None) -> None:
    program, leaves = Program.of(llama)
    sizes = (np.asarray(size, np.int32) for size in (32, 40, 16))
    sampler, ends = Sampler.of(128), np.full(8, -1, np.int32)
    request = loop.Request(np.zeros(1, np.int32), *sizes, sampler, ends)
    tokens = np.zeros((1, 32), np.int32)
    state, *_ = loop._prefill.eval_shape(program, 128, traceable(DenseCache), leaves, tokens, request)
    text = loop._decode.lower(program, trips, leaves, state).compile().as_text()
    assert text.count(" while(") == 1
    assert text.count('"known_trip_count":{"n":"16"}') == (0 if trips is None else 1)


def test_a_full_context_does_not_drift() -> None:
    """The likelihoods of 1,024 generated tokens, at their ends too, are those of one forward over all of them."""
    context = 1024
    model = random_llama(dataclasses.replace(random_llama().config, max_position_embeddings=context))
    found = generate(model, [ROWS[0]], max_new_tokens=context - 3, logprobs=0, eos=())[0]
    whole = np.asarray([ROWS[0] + found.tokens])
    assert whole.shape[1] == context
    likely = np.asarray(jax.nn.log_softmax(model(whole)[0, 2:-1]))
    np.testing.assert_allclose(found.logprobs, likely[np.arange(context - 3), found.tokens], atol=1e-4)
    assert (likely.max(axis=1) - found.logprobs).max() < 1e-4
