"""Tokenizers of a vocab.json and a merges.txt: the ids of transformers, and what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from test_special_tokens import entry

from any4_jax.models.special_tokens import SETTINGS
from any4_jax.models.tokenizer import VOCABULARY, Tokenizer
from any4_jax.models.vocab_merges import MERGES, VOCAB

transformers = pytest.importorskip("transformers")

MADE = "#version: 0.2\na b\n\u0120 ab\n1 2\n"
WORDS = ("<s>", "<pad>", "</s>", "<unk>", *"abc12!'s\u0120\u010a\u00c3\u00a9", "ab", "\u0120ab", "12")
TEXTS = ("ab ab 12's!\n", "</s>ab<pad>", "caf\u00e9 <x>", "", " ab  ab")


def write(folder: Path, settings: dict[str, Any], **others: str) -> Path:
    """A folder as OPT has it."""
    ids = {word: index for index, word in enumerate(WORDS)}
    files = {
        VOCAB: json.dumps(ids),
        MERGES: MADE,
        SETTINGS: json.dumps({"tokenizer_class": "GPT2Tokenizer"} | settings),
    }
    for name, content in (files | others).items():
        (folder / name).write_text(content)
    return folder


OPT = {"bos_token": entry("</s>"), "eos_token": entry("</s>"), "unk_token": entry("</s>"), "pad_token": entry("<pad>")}


@pytest.mark.parametrize(
    "settings",
    [
        {**OPT, "add_bos_token": True, "add_prefix_space": False},
        {**OPT, "add_bos_token": False},
        {**OPT, "add_prefix_space": True},
        {**OPT, "additional_special_tokens": ["<x>"]},
    ],
)
def test_ids_are_those_of_transformers(tmp_path: Path, settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    theirs = transformers.AutoTokenizer.from_pretrained(write(tmp_path, settings))
    ours = Tokenizer.from_folder(tmp_path)
    assert ours is not None
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert [ours.decode(ours.encode(text), False) for text in TEXTS] == [
        theirs.decode(theirs.encode(text), clean_up_tokenization_spaces=False) for text in TEXTS
    ]
    assert (ours.bos_id, ours.eos_ids) == (2, (2,))
    assert set(ours.files) == {VOCABULARY, SETTINGS}
    assert Tokenizer.from_files(ours.files) == ours


def test_other_classes_have_other_rules(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(write(tmp_path, {"tokenizer_class": "RobertaTokenizer"})) is None


@pytest.mark.parametrize(
    "settings, files, words",
    [
        ({}, {VOCAB: "[]"}, "vocab.json holds a list"),
        ({}, {VOCAB: '{"a": -1}'}, "vocab.json: .*-1"),
        ({}, {MERGES: "#version\na\n"}, "merges.txt: line 2 is 'a', and two tokens"),
        ({}, {MERGES: "#version\na b\nq r\n"}, "merges.txt: line 3 is 'q r', and two tokens"),
        (
            {"bos_token": "<x>", "add_bos_token": True},
            {},
            "bos_token of tokenizer_config.json is '<x>', which vocab.json",
        ),
    ],
)
def test_what_files_say_is_checked(tmp_path: Path, settings: dict, files: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Tokenizer.from_folder(write(tmp_path, settings, **files))
