"""Texts that grow in turns, and chats: a turn reads new tokens alone, and gives what the whole text gives."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest

from any4_jax.generate import Chat, Session, generate_tokens, session
from any4_jax.kv_cache import DenseCache, Kivi
from any4_jax.models import tiny as models
from any4_jax.models.base import Decoder

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content | trim }}</s>\n"
    "{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
)
KIVI = Kivi(bits=4, group_size=8, residual=16, exact_prompt=False)


def with_template(template: str) -> Decoder:
    """One block, and a tokenizer with a chat template."""
    config = models.random_llama().config
    config = dataclasses.replace(config, num_hidden_layers=1, max_position_embeddings=400, vocab_size=512)
    model = models.random_llama(config)
    model.tokenizer = copy.copy(models.tiny().tokenizer)
    model.tokenizer.chat_template = template
    return model


@pytest.fixture(scope="module")
def small() -> Decoder:
    return with_template(TEMPLATE)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of the program that reads got."""
    sizes: list[int] = []
    append = session._append

    def counted(program, leaves, tokens, *rest):
        sizes.append(len(tokens))
        return append(program, leaves, tokens, *rest)

    monkeypatch.setattr(session, "_append", counted)
    return sizes


def drawn(growing: Session, ids: list[int], **settings: Any) -> list[int]:
    return [token for chunk in growing.extend(ids, **settings) for token in chunk.tokens[0]]


def anew(model: Decoder, tokens: list[int], cache: Any, **settings: Any) -> list[int]:
    """What a prompt of all tokens gives."""
    return [token for (row,) in generate_tokens(model, [tokens], cache=cache, **settings) for token in row]


def ids_of(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 512, count).tolist()


TURNS = [
    (ids_of(0, 33), {"max_new_tokens": 9}),
    (ids_of(1, 9), {"max_new_tokens": 9, "eos": "fourth"}),
    (ids_of(2, 226), {"max_new_tokens": 2, "repetition_penalty": 1.3}),
]


@pytest.mark.parametrize("cache, turns", [(DenseCache, TURNS), (KIVI, TURNS[:2])], ids=["dense", "kivi"])
def test_a_turn_reads_the_new_tokens_and_gives_what_the_whole_text_gives(small, cache, turns, read) -> None:
    """Turns that end at the limit and at an end-of-text id; the plain cache has more slots in the third."""
    growing, held = Session(small, cache=cache), []
    for ids, settings in turns:
        text, kept = [*growing.tokens, *ids], growing._cached
        if settings.get("eos"):
            settings = settings | {"eos": anew(small, text, cache, max_new_tokens=9)[3]}
        read.clear()
        added = drawn(growing, ids, **settings)
        assert added == anew(small, text, cache, **settings) and len(added) > 1
        assert growing.tokens == text + added
        # At most the last token of the turn before is read again, for it was drawn and never read.
        assert sum(read) == len(text) - kept <= len(ids) + 1 and set(read) <= set(session.PIECES)
        held.append(growing._held)
    assert held == ([256, 256, 400] if cache is DenseCache else [400, 400])


def test_a_turn_may_be_left_and_an_interrupted_one_is_read_anew(small, read) -> None:
    growing, ids, more = Session(small), ids_of(4, 9), ids_of(5, 2)
    for _ in growing.extend(ids, max_new_tokens=9, chunk=1):
        if len(growing.tokens) == len(ids) + 3:
            break
    for lost in (0, 1):
        if lost:
            growing._caches = None  # as an interrupt of a program that has them leaves it
        text = [*growing.tokens, *more]
        read.clear()
        assert drawn(growing, more, max_new_tokens=9) == anew(small, text, DenseCache, max_new_tokens=9)
        assert sum(read) == (len(text) if lost else len(more) + 1)
    growing.reset()
    assert drawn(growing, ids, max_new_tokens=0) == [] and growing.tokens == ids


def test_a_full_session_says_so(small) -> None:
    growing = Session(small, slots=20)
    with pytest.raises(ValueError, match="a text of 0 tokens, 15 more and 6 new ones exceed the 20 that the session"):
        drawn(growing, [5] * 15, max_new_tokens=6)
    assert growing.tokens == []
    for slots in (0, 10**6):
        with pytest.raises(ValueError, match=f"slots is {slots}, and 1 to 400 is needed, as the model's context"):
            Session(small, slots=slots)


def test_a_chat_reads_what_its_template_writes_after_the_last_answer(small, read) -> None:
    chat = Chat(small, system="Tell a story.", slots=200)
    pieces: list[str] = []
    first = chat.answer("A dog", max_new_tokens=6, stream=pieces.append)
    tokens = list(chat.session.tokens)
    assert "".join(pieces) == first and tokens[:4] == small.tokenizer.encode_chat(chat.messages)[:4]
    new = chat.new_tokens("and 'the answer'")
    assert small.tokenizer.decode(new, skip_special=False).split() == ["</s>", "user:", "and", "'the", "answer'"]
    read.clear()
    chat.answer("and 'the answer'", max_new_tokens=6)
    assert sum(read) == len(new) + 1
    assert chat.session.tokens == tokens + new + anew(small, tokens + new, DenseCache, max_new_tokens=6)
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Tell a story."}] and chat.session.tokens == []
    assert chat.answer("A dog", max_new_tokens=6) == first


def test_a_template_without_earlier_answers_reads_the_conversation_anew(read) -> None:
    model = with_template("{% for m in messages if m.role != 'assistant' %}{{ m.content }}\n{% endfor %}")
    chat = Chat(model, slots=200)
    chat.answer("A dog", max_new_tokens=3)
    read.clear()
    chat.answer("a cat", max_new_tokens=3)
    assert sum(read) == len(model.tokenizer.encode("A dog\na cat\n", add_bos=False))
    with pytest.raises(ValueError, match="has no chat template, and a chat needs one; use generate"):
        Chat(models.random_llama())


def test_an_answer_ends_before_a_stop_string(small) -> None:
    whole = Chat(small, slots=200).answer("A dog", max_new_tokens=6)
    stop = whole[2:4]
    chat = Chat(small, slots=200)
    assert chat.answer("A dog", max_new_tokens=6, stop=stop) == whole[: whole.index(stop)]
    assert np.all(np.diff([len(chat.new_tokens(text)) for text in ("b", "b b b b")]) > 0)
