"""Tokenizers of GGUF metadata: how they cut a text, what ends a turn, and what is refused."""

from typing import Any

import pytest
import tokenizers

from any4_jax.models.gguf_cuts import CUTS
from any4_jax.models.gguf_tokenizer import read_tokenizer
from any4_jax.models.tokenizer import VOCABULARY


def metadata(**changes: Any) -> dict[str, Any]:
    """A byte-level tokenizer; a change to None leaves the key out."""
    words = ["ab", "12", "123", "1234"]
    merges = ["a b", "1 2", "12 3", "123 4"]
    tokens = [
        *"abcxXY'sS1234!/`,$\u00c4\u010a\u00c3\u00a9\u0120\u00cc\u0123",
        *words,
        "<s>",
        "<|im_end|>",
        "<|end|>",
        "<t>",
    ]
    kinds = [1] * len(tokens)
    kinds[-4:] = [3, 3, 1, 4]
    stored = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": merges, "token_type": kinds} | changes
    return {f"tokenizer.ggml.{key}": value for key, value in stored.items() if value is not None}


def pieces(pre: str, text: str) -> list[str]:
    """What the rules leave together."""
    tokenizer = read_tokenizer(metadata(pre=pre))
    assert tokenizer is not None
    cut = tokenizers.Tokenizer.from_str(tokenizer.files[VOCABULARY].decode()).pre_tokenizer
    return [text[begin:end] for _, (begin, end) in cut.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    "pre, text, expected",
    [
        # The same text under each rule for digits, signs and spaces.
        ("qwen2", "ab 1234!\n\nX", ["ab", " ", "1", "2", "3", "4", "!\n\n", "X"]),
        ("llama-bpe", "ab 1234!\n\nX", ["ab", " ", "123", "4", "!\n\n", "X"]),
        ("dbrx", "ab 1234!\n\nX", ["ab", " ", "123", "4", "!\n\n", "X"]),
        ("gpt-2", "ab 1234!\n\nX", ["ab", " 1234", "!", "\n", "\n", "X"]),
        ("starcoder", "ab 1234!\n\nX", ["ab", " ", "1", "2", "3", "4", "!", "\n", "\n", "X"]),
        ("falcon", "ab 1234`!\n\nX", ["ab", " ", "123", "4", "`!", "\n", "\n", "X"]),
        ("deepseek-coder", "ab 1234!\n\nX", ["ab", " ", "1", "2", "3", "4", "!", "\n", "\n", "X"]),
        ("deepseek-v3", "ab 1234!\n\nX", ["ab", " ", "123", "4", "!\n\n", "X"]),
        ("tekken", "ab 1234!\n\nX", ["ab", " ", "1", "2", "3", "4", "!\n\n", "X"]),
        # Case, contractions, paths and combining marks.
        ("tekken", "abXYab's", ["ab", "XYab", "'s"]),
        ("tekken", "ab!/\nab", ["ab", "!/\n", "ab"]),
        ("qwen2", "ab!/\nab", ["ab", "!/\n", "ab"]),
        ("qwen2", "ab'S ab", ["ab", "'S", " ab"]),
        ("gpt-2", "ab'S ab", ["ab", "'", "S", " ab"]),
        ("qwen2", "a\u0323b", ["a", "\u0323b"]),
        ("qwen35", "a\u0323b", ["a\u0323b"]),
        ("deepseek-v3", "!ab \u4e00\u3042x", ["!ab", " ", "\u4e00\u3042", "x"]),
    ],
)
def test_cuts(pre: str, text: str, expected: list[str]) -> None:
    assert pieces(pre, text) == expected


@pytest.mark.parametrize("pre", CUTS)
def test_every_kind_of_cut_gives_the_text_back(pre: str) -> None:
    tokenizer = read_tokenizer(metadata(pre=pre, bos_token_id=len(metadata()["tokenizer.ggml.tokens"]) - 4))
    assert tokenizer is not None
    text = "ab  1234!, $x\n\nXY'S `ab/\u00e9"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert (ids[0] == tokenizer.bos_id) == CUTS[pre].whole_words_first


@pytest.mark.parametrize("pre, composes", [("qwen2", True), ("qwen35", True), ("gpt-2", False)])
def test_who_composes_characters(pre: str, composes: bool) -> None:
    tokens = [*metadata()["tokenizer.ggml.tokens"], "e"]
    tokenizer = read_tokenizer(metadata(pre=pre, tokens=tokens, token_type=None))
    assert tokenizer is not None
    assert (tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")) == composes


def test_ends_of_turns_by_id_and_by_text() -> None:
    count = len(metadata()["tokenizer.ggml.tokens"])
    silent = read_tokenizer(metadata())
    named = read_tokenizer(metadata(eos_token_id=count - 4, eot_token_id=count - 1, eom_token_id=0))
    assert silent is not None and named is not None
    assert silent.eos_ids == (count - 3, count - 2)
    assert named.eos_ids == (count - 4, count - 1, 0, count - 3, count - 2)
    # A normal token with such a text is one token of the text, too.
    assert silent.encode("ab<|end|>") == [silent.encode("ab")[0], count - 2]
    assert (silent.decode([count - 2]), silent.decode([count - 1])) == ("", "<t>")


def test_the_chat_template_of_the_file() -> None:
    stored = {**metadata(), "tokenizer.chat_template": "{{ messages[0].content }}<|im_end|>"}
    tokenizer = read_tokenizer(stored)
    assert tokenizer is not None
    assert tokenizer.apply_chat([{"role": "user", "content": "ab"}]) == "ab<|im_end|>"
    assert tokenizer.encode_chat([{"role": "user", "content": "ab"}])[-1] == tokenizer.eos_ids[0]


@pytest.mark.parametrize("prefix, expected", [(None, ["\u2581a", "b"]), (True, ["\u2581a", "b"]), (False, ["a", "b"])])
def test_sentencepiece_with_and_without_a_first_space(prefix: bool | None, expected: list[str]) -> None:
    tokens = ["<unk>", "<bos>", "a", "b", "\u2581", "\u2581a", "\u2581\u2581", "<end_of_turn>", ""]
    tokenizer = read_tokenizer(
        metadata(
            model="llama",
            pre=None,
            tokens=tokens,
            scores=[0.0] * 5 + [-1.0, -2.0, 0.0, 0.0],
            token_type=[2, 3, 1, 1, 1, 1, 4, 4, 1],
            bos_token_id=1,
            unknown_token_id=0,
            add_space_prefix=prefix,
            merges=None,
        )
    )
    assert tokenizer is not None
    assert [tokens[i] for i in tokenizer.encode("ab")] == ["<bos>", *expected]
    assert [tokens[i] for i in tokenizer.encode("ab<end_of_turn>", add_bos=False)] == [*expected, "<end_of_turn>"]
    assert tokenizer.eos_ids == (7,)
    assert tokenizer.decode(tokenizer.encode("ab a")) == "ab a"


LLAMA = {"model": "llama", "pre": None, "merges": None, "token_type": None}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unigram": ({"model": "t5"}, "model 't5' is not supported"),
    "wordpiece": ({"model": "bert"}, "model 'bert' is not supported"),
    "a number for a model": ({"model": 5}, "model 5 is not supported"),
    "a rule nobody knows": ({"pre": "mystery"}, "pre 'mystery' has unknown rules"),
    "a number for a rule": ({"pre": 7}, "tokenizer.ggml.pre is 7, and"),
    "no tokens": ({"tokens": None}, "lacks tokenizer.ggml.tokens"),
    "empty tokens": ({"tokens": []}, "tokenizer.ggml.tokens is .*at least 1 item"),
    "one text": ({"tokens": "abc"}, "tokenizer.ggml.tokens is 'abc', and"),
    "numbers": ({"tokens": [1, 2]}, "tokenizer.ggml.tokens.0 is 1, and"),
    "equal tokens": ({"tokens": ["a"] * 9, "token_type": None}, "has 'a' at 0 and at 1, and distinct tokens"),
    "short kinds": ({"token_type": [1, 2]}, "token_type has 2 values, and one for each of the 33 tokens"),
    "kinds of text": ({"token_type": ["a"]}, "token_type.0 is 'a', and"),
    "no merges": ({"merges": None}, "lacks tokenizer.ggml.merges"),
    "merges of one": ({"merges": ["ab"]}, "merges.0 is 'ab', and two tokens"),
    "merges of strangers": ({"merges": ["a b", "q r"]}, "merges.1 is 'q r', and two tokens"),
    "merges of three": ({"merges": ["a b c"]}, "merges.0 is 'a b c', and two tokens"),
    "merges into nothing": ({"merges": ["a X"]}, "merges.0 is 'a X', and two tokens"),
    "merges in one text": ({"merges": "a b"}, "tokenizer.ggml.merges is 'a b', and"),
    "a flag of text": ({"add_bos_token": "yes"}, "add_bos_token is 'yes', and"),
    **{
        f"{name} of {value}": ({f"{name}_token_id": value}, f"tokenizer.ggml.{name}_token_id is {value!r}, and")
        for name in ("bos", "eos", "eot", "eom", "unknown")
        for value in (-1, 33, 2**32 - 1, 1.5, "a")
    },
    "no scores": ({**LLAMA}, "lacks tokenizer.ggml.scores"),
    "few scores": ({**LLAMA, "scores": [0.0]}, "scores has 1 values"),
    "scores of nothing": ({**LLAMA, "scores": [float("nan")] * 33}, "scores.0 is nan, and"),
    "a long token": ({**LLAMA, "tokens": ["a" * 10**6], "scores": [0.0]}, "has 1000000 characters"),
}


@pytest.mark.parametrize("changes, words", REFUSED.values(), ids=REFUSED)
def test_what_the_file_says_is_checked(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_tokenizer(metadata(**changes))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_template_that_is_no_text() -> None:
    with pytest.raises(ValueError, match="tokenizer.chat_template is 5, and"):
        read_tokenizer({**metadata(), "tokenizer.chat_template": 5})
