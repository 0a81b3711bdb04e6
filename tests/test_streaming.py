"""Streamed text: any tokens in pieces of any size, characters cut anywhere, stop strings, in linear time."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Sequence

import pytest
import tokenizers

from any4_jax.generate.streaming import StopStrings, TextStream
from any4_jax.models.tiny import tiny

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CHARACTERS = [character.encode() for character in ("😀", "🎉", "日", "é")]


class Vocabulary:
    """A tokenizer for random sequences: a cached `decode`, the bytes of every id, and a prompt that is text."""

    def __init__(self, decode: Callable[[list[int]], str], pieces: dict[int, bytes], prompt: list[int]) -> None:
        self._decode = functools.lru_cache(maxsize=None)(lambda ids: decode(list(ids)))
        self.pieces = pieces
        self.prompt = prompt
        # A byte has one token of its own, which is the first of several with these bytes.
        self.of_byte = {piece[0]: i for i, piece in reversed(pieces.items()) if len(piece) == 1}

    def decode(self, ids: Sequence[int]) -> str:
        return self._decode(tuple(ids))

    def draw(self, rng: random.Random) -> list[int]:
        """A few tokens: characters in bytes, whole or cut, stray bytes, and any others."""
        ids: list[int] = []
        for _ in range(rng.randint(1, 4)):
            character = rng.choice(CHARACTERS)
            kind = rng.random()
            if kind < 0.4:
                end = rng.choice([len(character), rng.randint(1, len(character))])
                ids += [self.of_byte[byte] for byte in character[:end]]
            elif kind < 0.6:
                ids.append(self.of_byte[rng.randint(0x80, 0xFF)])
            else:
                ids.append(rng.choice(list(self.pieces)))
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """What the bytes of the tokens say."""
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


def byte_level() -> Vocabulary:
    """Byte-level BPE: all bytes, and tokens that begin or end within a character."""
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in alphabet]
    spelled = {byte: chr(byte) for byte in alphabet} | {byte: chr(256 + n) for n, byte in enumerate(rest)}
    cut = [
        b" \xf0\x9f",
        b"\x98\x80",
        b"\x80\xf0",
        b"\x82\xac\xf0",
        b"\xe2\x82",
        b"\xac\xf0\x9f",
        b"a\xe6",
        b"\x97\xa5b",
    ]
    whole = [" hello", "é", "日本", "😀", REPLACEMENT]
    pieces = [*(bytes([byte]) for byte in range(256)), *cut, *(word.encode() for word in whole)]
    vocabulary = {"".join(spelled[byte] for byte in piece): i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<|end|>"])
    tokenizer.add_tokens(["<tool>"])
    return Vocabulary(tokenizer.decode, dict(enumerate([*pieces, b"", b"", b"<tool>"])), [vocabulary["a"]])


def sentencepiece() -> Vocabulary:
    """The bundled model's tokenizer: words that begin with a space, and a token for each byte."""
    tokenizer = tiny().tokenizer
    vocabulary = tokenizers.Tokenizer.from_str(tokenizer.files["tokenizer.json"].decode()).get_vocab()

    def piece(token: str) -> bytes:
        byte = re.fullmatch("<0x(..)>", token)
        special = token in ("<unk>", "<s>", "</s>")
        return bytes.fromhex(byte[1]) if byte else b"" if special else token.replace("\u2581", " ").encode()

    pieces = {i: piece(token) for token, i in sorted(vocabulary.items(), key=lambda item: item[1])}
    return Vocabulary(tokenizer.decode, pieces, [1, vocabulary["\u2581One"]])


VOCABULARIES = {"byte-level": byte_level, "SentencePiece": sentencepiece}


@pytest.fixture(scope="module", params=VOCABULARIES)
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return VOCABULARIES[request.param]()


def streamed(vocabulary: Vocabulary, prompt: list[int], ids: list[int], rng: random.Random) -> tuple[list[str], str]:
    """The pieces and the returned text of tokens that come a few at a time."""
    pieces: list[str] = []
    stream = TextStream(vocabulary.decode, prompt, pieces.append)
    while ids:
        n = rng.randint(1, 4)
        stream.extend(ids[:n])
        ids = ids[n:]
    return pieces, stream.finish()


def test_what_is_streamed_is_what_is_returned_and_what_the_bytes_say(vocabulary: Vocabulary) -> None:
    rng = random.Random(0)
    for _ in range(5000):
        ids, prompt = (
            vocabulary.draw(rng),
            rng.choice([vocabulary.prompt, vocabulary.prompt, [], ids_of_bytes(vocabulary)]),
        )
        pieces, text = streamed(vocabulary, prompt, ids, rng)
        assert text == "".join(pieces) == TextStream.whole(vocabulary.decode, prompt, ids), ids
        assert all(pieces)
        if prompt == vocabulary.prompt:
            # Decoders give one replacement a byte or one for several bytes; what stands between them is the same.
            found, wanted = (re.sub(f"{REPLACEMENT}+", REPLACEMENT, said) for said in (text, vocabulary.text(ids)))
            assert found == wanted, ids


def ids_of_bytes(vocabulary: Vocabulary) -> list[int]:
    """A prompt that ends with a character in bytes."""
    return [vocabulary.of_byte[byte] for byte in "😀".encode()]


def test_whole_text_is_that_of_the_byte_level_decoder() -> None:
    vocabulary, rng = byte_level(), random.Random(1)
    for _ in range(1000):
        ids = vocabulary.draw(rng)
        assert TextStream.whole(vocabulary.decode, vocabulary.prompt, ids) == vocabulary.decode(ids)


@pytest.mark.parametrize(
    "data, wanted",
    [
        # A stray byte after a character, before one, and many of them: what follows is printed.
        ("é".encode() + b"\x9fab", "é?ab"),
        (b"\x9f" + "é".encode(), "?é"),
        (b"\x9f" * 4 + b"a", "?a"),
        # A cut character leaves the one before it as it is, and the one after it.
        ("😀".encode() + "😀".encode()[:2], "😀?"),
        ("😀".encode()[:2] + "é".encode(), "?é"),
        ("😀".encode()[:3] + b"a", "?a"),
    ],
)
def test_a_stray_byte_spoils_no_character(vocabulary: Vocabulary, data: bytes, wanted: str) -> None:
    ids = [vocabulary.of_byte[byte] for byte in data]
    pieces, text = streamed(vocabulary, vocabulary.prompt, ids, random.Random(0))
    assert re.sub(f"{REPLACEMENT}+", "?", text) == wanted
    assert text == "".join(pieces)


def test_characters_come_when_they_are_complete(vocabulary: Vocabulary) -> None:
    pieces: list[str] = []
    stream = TextStream(vocabulary.decode, vocabulary.prompt, pieces.append)
    for byte in "né €😀!".encode():
        stream.extend([vocabulary.of_byte[byte]])
    assert pieces == ["n", "é", " ", "€", "😀", "!"]


def test_at_most_three_tokens_are_held_back(vocabulary: Vocabulary) -> None:
    found: list[str] = []
    stream = TextStream(vocabulary.decode, vocabulary.prompt, found.append)
    stray = vocabulary.of_byte[0x9F]
    for n in range(1, 10):
        stream.extend([stray])
        assert len("".join(found)) >= n - 3
    stream.extend([vocabulary.of_byte[byte] for byte in "😀".encode()])
    assert "".join(found) == REPLACEMENT * 9 + "😀"


def test_the_time_is_linear(vocabulary: Vocabulary) -> None:
    lengths: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        lengths.append(len(ids))
        return vocabulary.decode(ids)

    rng = random.Random(2)
    ids = [i for _ in range(200) for i in vocabulary.draw(rng)]
    stream = TextStream(decode, vocabulary.prompt * 500)
    stream.extend(ids)
    assert max(lengths) <= 8
    assert len(lengths) <= 20 * len(ids)


@pytest.mark.parametrize(
    "strings, text, wanted",
    [
        (["\n\n"], "a\nb\n\nc", "a\nb"),
        (["abab"], "xaababab", "xa"),
        (["aab"], "aaab", "a"),
        # The string that is complete first ends the text, however long another one would have become.
        (["b", "abc"], "xabc", "xa"),
        (["bc", "abc"], "xabc", "x"),
        (["abd", "c"], "abcx", "ab"),
        (["never"], "never say nev", ""),
        (["never"], "say nev", "say nev"),
        (["é"], "caf\u00e9s", "caf"),
        ([], "abc", "abc"),
    ],
)
def test_text_ends_before_the_first_stop_string(strings: list[str], text: str, wanted: str) -> None:
    rng = random.Random(0)
    for _ in range(20):
        stop, passed, rest = StopStrings(strings), "", text
        while rest and not stop.met:
            n = rng.randint(1, 4)
            passed += stop.push(rest[:n])
            assert wanted.startswith(passed)
            rest = rest[n:]
        assert passed + stop.finish() == wanted
        assert stop.met == (wanted != text)


def test_a_stop_string_spans_tokens_and_ends_the_tokens(vocabulary: Vocabulary) -> None:
    pieces: list[str] = []
    ids = [vocabulary.of_byte[byte] for byte in "ab😀c".encode()]
    stream = TextStream(vocabulary.decode, vocabulary.prompt, pieces.append, stop=["b😀"])
    for i in ids:
        stream.extend([i])
    assert (pieces, stream.stopped, stream.tokens) == (["a"], True, ids[:-1])
    assert stream.finish() == "a"
