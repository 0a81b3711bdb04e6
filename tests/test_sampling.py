"""Settings of `generate`: limits, penalties, seeds, n, stop strings, log-probabilities, chats, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax.generate import Continuation, generate, generate_chunks, generate_tokens
from any4_jax.generate.penalties import Counts, Penalties
from any4_jax.generate.sampling import INVALID, Sampler
from any4_jax.models.llama import Llama
from any4_jax.models.tiny import random_llama

ROWS = [[5, 9, 2], [100, 3, 3, 7, 64, 2, 8]]


@dataclasses.dataclass(frozen=True)
class Letters:
    """A tokenizer whose tokens are characters, with a template for chats."""

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = "a template"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: Any) -> list[int]:
        return self.encode("".join(f"<{message['role']}>{message['content']}" for message in messages))

    def decode(self, ids: Any) -> str:
        return "".join(chr(i) for i in ids)


@pytest.fixture(scope="module")
def model() -> Llama:
    """Random weights, with a spread head: the likeliest token varies along a text."""
    model = random_llama()
    model.tokenizer = Letters()
    model.lm_head.kernel.set_value(model.lm_head.kernel.get_value() * 4)
    return model


SAMPLE = jax.jit(Sampler.sample)
PROBABILITY = np.asarray([0.4, 0.3, 0.15, 0.1, 0.05])


@pytest.mark.parametrize(
    "settings, kept",
    [
        ({"min_p": 0.3}, 3),
        ({"min_p": 1.0}, 1),
        ({"min_p": 0.0}, 5),
        # min_p looks at what the other limits left, of which the likeliest always is one.
        ({"min_p": 0.3, "top_k": 2}, 2),
        ({"min_p": 0.7, "top_p": 0.8}, 2),
    ],
)
def test_min_p_keeps_tokens_near_the_likeliest(settings: dict[str, Any], kept: int) -> None:
    logits = jnp.broadcast_to(jnp.log(PROBABILITY).astype(jnp.float32), (2000, 5))
    tokens = np.asarray(SAMPLE(Sampler.of(5, 1.0, **settings), logits, 0))
    assert sorted(set(tokens.tolist())) == list(range(kept))


def test_min_p_looks_at_the_distribution_at_the_temperature() -> None:
    logits = jnp.broadcast_to(jnp.log(PROBABILITY).astype(jnp.float32), (2000, 5))
    tokens = np.asarray(SAMPLE(Sampler.of(5, 2.0, min_p=0.45), logits, 0))
    assert set(tokens.tolist()) == {i for i, p in enumerate(PROBABILITY**0.5) if p >= 0.45 * PROBABILITY[0] ** 0.5}


def test_penalties_follow_their_formulas(rng: np.random.Generator) -> None:
    logits = rng.normal(size=(2, 6)).astype(np.float32)
    prompts = np.asarray([[0, 0, 3], [4, 4, 1]], np.int32)
    counts = Counts.of(jnp.asarray(prompts), jnp.asarray([2, 0]), 6)
    for token in ([1, 1], [1, 5]):
        counts = counts.add(jnp.asarray(token))
    penalties = Penalties.of(1.5, 0.25, -0.5)
    assert penalties is not None
    wanted = logits.copy()
    # The first row's prompt is its last token only, as two are padding.
    for row, (prompt, new) in enumerate([([3], [1, 1]), ([4, 4, 1], [1, 5])]):
        for token in {*prompt, *new}:
            wanted[row, token] *= 1 / 1.5 if wanted[row, token] > 0 else 1.5
        for token in set(new):
            wanted[row, token] -= 0.25 * new.count(token) - 0.5
    np.testing.assert_allclose(penalties.apply(jnp.asarray(logits), counts), wanted, rtol=1e-6)


def test_a_penalty_keeps_tokens_from_coming_back(model: Llama) -> None:
    plain = generate(model, ROWS, max_new_tokens=20)
    assert any(len(set(row)) < 20 for row in plain)
    settings = {"max_new_tokens": 20, "repetition_penalty": 1e6}
    for prompt, new in zip(ROWS, generate(model, ROWS, **settings), strict=True):
        assert len(set(new)) == 20 and not set(new) & set(prompt)
    # In the first token nothing has been generated, so that a presence penalty starts with the second.
    other = generate(model, ROWS, max_new_tokens=20, presence_penalty=2.0)
    assert [row[0] for row in other] == [row[0] for row in plain] and other != plain


def test_greedy_and_sampled_programs_serve_all_penalties_and_logprobs(model: Llama, count_compiles: Any) -> None:
    generate(model, ROWS, max_new_tokens=5, repetition_penalty=1.1, logprobs=0)
    with count_compiles() as compiles:
        generate(model, ROWS, max_new_tokens=9, presence_penalty=0.5, frequency_penalty=1, logprobs=7)
    assert compiles.count == 0


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, -(2**40), 10**20])
def test_any_integer_is_a_seed(seed: int) -> None:
    logits = jnp.zeros((64, 100), jnp.float32)

    def tokens(seed: int | None) -> list[int]:
        return np.asarray(SAMPLE(Sampler.of(100, 1.0, seed=seed), logits, 0)).tolist()

    assert tokens(seed) == tokens(seed) == tokens(seed + 2**64)
    assert tokens(seed) != tokens(0) == tokens(None)


def test_small_seeds_draw_as_keys_of_jax_do() -> None:
    logits = jnp.zeros((64, 100), jnp.float32)
    wanted = jax.random.categorical(jax.random.fold_in(jax.random.key(3), 2), logits)
    np.testing.assert_array_equal(SAMPLE(Sampler.of(100, 1.0, seed=3), logits, 2), wanted)


def test_n_gives_a_list_for_each_prompt(model: Llama) -> None:
    settings = {"max_new_tokens": 6, "temperature": 1.5, "n": 3}
    one = generate(model, "ab", **settings)
    assert len(one) == len(set(one)) == 3 and all(isinstance(text, str) for text in one)
    assert generate(model, ["ab"], **settings) == [one]
    assert [[len(ids) for ids in row] for row in generate(model, ROWS[:1], **settings)] == [[6] * 3]


def test_logprobs_are_those_of_the_whole_forward(model: Llama) -> None:
    settings = {"max_new_tokens": 20, "temperature": 2.0, "top_k": 5, "repetition_penalty": 1.3}
    prompts = [[5, 9, 2], [100, 3, 3]]
    for prompt, found in zip(prompts, generate(model, prompts, logprobs=3, **settings), strict=True):
        assert isinstance(found, Continuation)
        assert found.text is None and found.finish_reason == "length" and len(found.tokens) == 20
        logits = model(np.asarray([prompt + found.tokens]))[0, len(prompt) - 1 : -1]
        wanted = np.asarray(jax.nn.log_softmax(logits, axis=-1))
        np.testing.assert_allclose(found.logprobs, wanted[range(20), found.tokens], atol=1e-4)
        for alternatives, row in zip(found.alternatives, wanted, strict=True):
            np.testing.assert_allclose(list(alternatives.values()), np.sort(row)[::-1][:3], atol=1e-4)
            np.testing.assert_allclose(list(alternatives.values()), row[list(alternatives)], atol=1e-4)
    plain = generate(model, prompts, **settings)
    assert plain == [found.tokens for found in generate(model, prompts, logprobs=0, **settings)]


def test_a_stop_string_ends_text_stream_and_tokens(model: Llama) -> None:
    free = generate(model, "ab", max_new_tokens=20)
    stop = free[5:8]
    pieces: list[str] = []
    text = generate(model, "ab", max_new_tokens=20, stop=stop, stream=pieces.append)
    assert text == "".join(pieces) == free[: free.index(stop)]
    assert generate(model, ["ab", "c"], max_new_tokens=20, stop=[stop, "never"])[0] == text
    found = generate(model, "ab", max_new_tokens=20, stop=stop, logprobs=0)
    assert (found.text, found.finish_reason) == (text, "stop")
    assert len(found.tokens) == len(found.logprobs) == len(text) + 3
    assert generate(model, "ab", max_new_tokens=20, stop="never") == free


def test_the_reason_for_the_end_is_told(model: Llama) -> None:
    free = generate(model, ROWS, max_new_tokens=20)
    end = free[0][6]
    found = generate(model, ROWS, max_new_tokens=20, eos=end, logprobs=0)
    assert [each.finish_reason for each in found] == ["stop" if end in row else "length" for row in free]
    *early, last = generate_chunks(model, ROWS, max_new_tokens=20, eos=())
    assert {reason for chunk in early for reason in chunk.finish_reasons} == {None}
    assert last.finish_reasons == ["length", "length"] and last.logprobs == [[], []]


def test_chats_are_encoded_by_the_tokenizer(model: Llama) -> None:
    chat = [{"role": "u", "content": "hi"}, {"role": "a", "content": "yo"}]
    wanted = generate(model, "<u>hi<a>yo", max_new_tokens=8)
    assert generate(model, chat, max_new_tokens=8) == wanted
    assert generate(model, [chat, chat[:1]], max_new_tokens=8)[0] == wanted


def test_a_chat_needs_a_template() -> None:
    model = random_llama()
    model.tokenizer = Letters(chat_template=None)
    with pytest.raises(ValueError, match="no chat template"):
        generate(model, [{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_told(temperature: float, value: float) -> None:
    model = random_llama()
    row = generate(model, ROWS[0], max_new_tokens=6, temperature=temperature)
    kernel = model.embed_tokens.embedding.get_value()
    # The embedding of a token that is generated later spoils the logits after it.
    at = max(row.index(token) for token in row if token not in ROWS[0])
    model.embed_tokens.embedding.set_value(kernel.at[row[at]].set(value))
    with pytest.raises(ValueError, match=rf"new token {at + 2} of row 0 are NaN or infinite.*dtype float32"):
        generate(model, ROWS[0], max_new_tokens=at + 8, temperature=temperature)
    assert generate(model, ROWS[0], max_new_tokens=at + 1, temperature=temperature) == row[: at + 1]


@pytest.mark.parametrize("greedy", [True, False])
def test_only_logits_with_a_likeliest_token_give_one(greedy: bool) -> None:
    inf = np.inf
    logits = jnp.asarray([[1, np.nan, 2], [-inf, -inf, -inf], [0, inf, 0], [-inf, 1, -inf]], jnp.float32)
    tokens = SAMPLE(Sampler.of(3, 0.0 if greedy else 1e-5), logits, 0)
    assert tokens.tolist() == [INVALID, INVALID, INVALID, 1]


WARM = {"temperature": 1.0}
CHAT = [{"role": "u", "content": "hi"}]


@pytest.mark.parametrize(
    "prompt, settings, kind, words",
    [
        ([1], {"max_new_tokens": 1.5}, TypeError, "max_new_tokens is 1.5, and an integer"),
        ([1], {"max_new_tokens": True}, TypeError, "max_new_tokens is True"),
        ([1], {"max_new_tokens": -1}, ValueError, "max_new_tokens is -1, and at least 0"),
        ([1], {"temperature": 1e-38}, ValueError, "temperature is 1e-38, and 0, which is greedy"),
        ([1], {"temperature": "1"}, TypeError, "temperature is '1'"),
        ([1], {"temperature": True}, TypeError, "temperature is True"),
        ([1], {"temperature": float("inf")}, ValueError, "temperature is inf"),
        ([1], {"top_k": 3}, ValueError, "top_k is 3, and temperature 0"),
        ([1], {"top_p": 0.9, "min_p": 0.1}, ValueError, "top_p is 0.9 and min_p is 0.1, and temperature 0"),
        ([1], {"seed": 0}, ValueError, "seed is 0, and temperature 0"),
        ([1], WARM | {"seed": 1.0}, TypeError, "seed is 1.0"),
        ([1], WARM | {"top_k": 1.5}, TypeError, "top_k is 1.5"),
        ([1], WARM | {"top_k": -1}, ValueError, "top_k is -1, and at least 1"),
        ([1], WARM | {"top_p": 0}, ValueError, "top_p is 0"),
        ([1], WARM | {"min_p": 1.1}, ValueError, "min_p is 1.1"),
        ([1], {"repetition_penalty": 0}, ValueError, "repetition_penalty is 0"),
        ([1], {"repetition_penalty": float("nan")}, ValueError, "repetition_penalty is nan"),
        ([1], {"presence_penalty": 2.5}, ValueError, "presence_penalty is 2.5, and -2 to 2"),
        ([1], {"frequency_penalty": None}, TypeError, "frequency_penalty is None"),
        ([1], {"n": 2}, ValueError, "n is 2, and with temperature 0"),
        ([1], {"n": 0}, ValueError, "n is 0"),
        ([1], {"logprobs": 21}, ValueError, "logprobs is 21, and 0 to 20"),
        ([1], {"logprobs": True}, TypeError, "logprobs is True"),
        ([1], {"eos": 128}, ValueError, "eos is 128, and 0 to 127"),
        ([1], {"eos": [2, 1.5]}, TypeError, "eos is 1.5"),
        ([1], {"eos": "x"}, TypeError, "eos is 'x'.*use stop"),
        ([1], {"stop": "x"}, ValueError, "stop needs text"),
        ("a", {"stop": ["x", ""]}, ValueError, "stop holds an empty text"),
        ("a", {"stop": [1]}, TypeError, r"stop is \[1\]"),
        ("a", {"stream": 1}, TypeError, "stream is a int"),
        ("a", WARM | {"stream": print, "n": 2}, ValueError, "stream needs one text"),
        (b"ab", {}, TypeError, "bytes; decode it"),
        ([b"ab"], {}, TypeError, "bytes; decode each"),
        (["a", 1], {}, TypeError, "list of ids and texts"),
        (["a", [1]], {}, TypeError, "list of lists of ids and texts"),
        ([1, [1]], {}, TypeError, "list of ids and lists of ids"),
        ([*CHAT, "a"], {}, TypeError, "list of messages and texts"),
        ([{"role": "u"}], {}, ValueError, "message 0 of the chat has no 'content'"),
        (CHAT[0], {}, TypeError, "the prompt is a dict"),
        (np.asarray(3), {}, TypeError, "the prompt is a int"),
        (np.asarray([1.5]), {}, TypeError, "float64"),
        ([1, True], {}, TypeError, "holds bool"),
        ([None], {}, TypeError, "holds object"),
        ([[1, [2]]], {}, ValueError, "several lengths"),
        ([[[1]]], {}, ValueError, r"shape \(1, 1\)"),
        ("\udcff", {}, ValueError, "read it as UTF-8"),
    ],
)
def test_what_is_refused(
    model: Llama, prompt: Any, settings: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        generate(model, prompt, **settings)


@pytest.mark.parametrize(
    "prompts, settings, kind, words",
    [
        ([[1]], {"chunk": 17}, ValueError, "chunk is 17, and 1 to 16"),
        ([[1]], {"chunk": 1.0}, TypeError, "chunk is 1.0"),
        (5, {}, TypeError, "prompts are a int"),
        ("ab", {}, TypeError, "prompts are a str"),
        ([], {}, ValueError, "list of prompts is empty"),
    ],
)
def test_generate_tokens_refuses(
    model: Llama, prompts: Any, settings: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        next(generate_tokens(model, prompts, **{"max_new_tokens": 1, **settings}))


def test_the_model_is_checked() -> None:
    with pytest.raises(TypeError, match="the model is a str"):
        generate("tiny", "a")  # type: ignore[arg-type]
