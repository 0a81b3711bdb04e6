"""The tokenizer: ids as transformers gives them, settings, identity by content."""

import json
import os
import pickle
from pathlib import Path

import pytest

from any4_jax.data import bundled
from any4_jax.models.special_tokens import SETTINGS
from any4_jax.models.tokenizer import FILES, VOCABULARY, Tokenizer

BODY = [403, 410, 1, 407, 261, 13]  # of "Once <s>upon a\n"


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    with bundled("stories260k") as folder:
        return {name: (folder / name).read_bytes() for name in (VOCABULARY, SETTINGS)}


def with_settings(files: dict[str, bytes], **changes: object) -> dict[str, bytes]:
    """The files with some keys of tokenizer_config.json replaced."""
    return {**files, SETTINGS: json.dumps({**json.loads(files[SETTINGS]), **changes}).encode()}


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [1, *BODY]),
        ({"add_bos_token": False}, [1, *BODY]),  # a class that leaves it to the post-processor
        ({"tokenizer_class": "LlamaTokenizerFast"}, [1, *BODY]),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, BODY),
        ({"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}, [1, *BODY, 2]),
    ],
)
def test_ids_are_those_of_transformers(files: dict[str, bytes], settings: dict, expected: list[int]) -> None:
    """The expected ids were printed by AutoTokenizer of transformers 4.57."""
    assert Tokenizer.from_files(with_settings(files, **settings)).encode("Once <s>upon a\n") == expected


def test_bos_as_asked_for(files: dict[str, bytes]) -> None:
    tokenizer = Tokenizer.from_files(files)
    body = tokenizer.encode("Once upon", add_bos=False)
    assert tokenizer.encode("Once upon", add_bos=True) == [1, *body] == tokenizer.encode("Once upon")
    spelled = tokenizer.encode("<s>Once upon", add_bos=False)
    assert spelled[0] == 1
    assert tokenizer.encode("<s>Once upon", add_bos=True) == spelled
    silent = Tokenizer.from_files(with_settings(files, bos_token=None))
    assert silent.bos_id is None
    with pytest.raises(ValueError, match="the tokenizer has none"):
        silent.encode("Once", add_bos=True)


@pytest.mark.parametrize("text", ["Once upon a time", "two  spaces\nand a line", "caf\u00e9 \u732b \U0001f408", ""])
def test_decode_inverts_encode(files: dict[str, bytes], text: str) -> None:
    tokenizer = Tokenizer.from_files(files)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False).startswith("<s>")


def test_identity_is_the_content(files: dict[str, bytes]) -> None:
    one, two = Tokenizer.from_files(files), Tokenizer.from_files(dict(reversed(files.items())))
    other = Tokenizer.from_files(with_settings(files, eos_token=None))
    assert one == two and hash(one) == hash(two)
    assert one != other
    assert (one.bos_id, one.eos_ids, one.vocab_size) == (1, (2,), 512)
    assert Tokenizer.from_files(one.files) == one == pickle.loads(pickle.dumps(one))


def test_stored_limits_do_not_cut(files: dict[str, bytes]) -> None:
    vocabulary = json.loads(files[VOCABULARY])
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    limited = {**files, VOCABULARY: json.dumps({**vocabulary, "truncation": cut}).encode()}
    text = "Once upon a time there was a cat"
    assert Tokenizer.from_files(limited).encode(text) == Tokenizer.from_files(files).encode(text)


def test_tokens_known_to_the_settings_only(files: dict[str, bytes]) -> None:
    extra = {"content": "<|user|>", "special": True, "normalized": False}
    tokenizer = Tokenizer.from_files(with_settings(files, added_tokens_decoder={"512": extra}))
    assert tokenizer.vocab_size == 513
    assert 512 in tokenizer.encode("Hi<|user|>there")
    with pytest.raises(ValueError, match="the id 600"):
        Tokenizer.from_files(with_settings(files, added_tokens_decoder={"600": extra}))


@pytest.mark.parametrize(
    "change, words",
    [
        ({VOCABULARY: None}, "tokenizer.json is needed"),
        ({VOCABULARY: b"{"}, "tokenizer.json can't be read"),
        ({SETTINGS: b"{"}, "tokenizer_config.json is not JSON"),
        ({SETTINGS: b"[]"}, "holds a list"),
        ({SETTINGS: b'{"eos_token": "<never>"}'}, "'<never>'"),
    ],
)
def test_damaged_files_are_named(files: dict[str, bytes], change: dict, words: str) -> None:
    changed = {name: content for name, content in {**files, **change}.items() if content is not None}
    with pytest.raises(ValueError, match=words):
        Tokenizer.from_files(changed)


def test_a_folder_without_tokenizer_json_has_none(tmp_path: Path, files: dict[str, bytes]) -> None:
    (tmp_path / SETTINGS).write_bytes(files[SETTINGS])
    assert Tokenizer.from_folder(tmp_path) is None
    (tmp_path / VOCABULARY).write_bytes(files[VOCABULARY])
    assert Tokenizer.from_folder(tmp_path) == Tokenizer.from_files(files)


@pytest.mark.parametrize(
    "text, words",
    [
        ("caf\udce9", "'.udce9' at character 3.*UTF-8"),  # a byte of Latin-1, as the command line passes it
        ("\ud83d", "at character 0"),
    ],
)
@pytest.mark.parametrize("add_bos", [None, True, False])
def test_what_is_no_unicode_text_is_refused(files: dict[str, bytes], text: str, words: str, add_bos: bool) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        Tokenizer.from_files(files).encode(text, add_bos)
    str(caught.value).encode()
    with pytest.raises(TypeError, match="the text is a bytes, and a string is needed"):
        Tokenizer.from_files(files).encode(b"a", add_bos)  # type: ignore[arg-type]


def test_a_text_that_the_vocabulary_lacks_is_refused(files: dict[str, bytes]) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    vocabulary = {**json.loads(files[VOCABULARY]), "model": model, "added_tokens": [], "post_processor": None}
    with pytest.raises(ValueError, match="the text can't be encoded"):
        Tokenizer.from_files({VOCABULARY: json.dumps(vocabulary).encode()}).encode("b")


@pytest.mark.parametrize("ids", [[-1], [2**32]])
def test_ids_that_no_vocabulary_has_are_refused(files: dict[str, bytes], ids: list[int]) -> None:
    with pytest.raises(ValueError, match="token ids"):
        Tokenizer.from_files(files).decode(ids)


@pytest.mark.parametrize("name", FILES)
def test_only_regular_files_are_read(tmp_path: Path, files: dict[str, bytes], name: str) -> None:
    (tmp_path / VOCABULARY).write_bytes(files[VOCABULARY])
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a named pipe, and a regular file is needed"):
        Tokenizer.from_folder(tmp_path)
