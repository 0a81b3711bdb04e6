"""Special and added tokens: what AutoTokenizer of transformers reads from the same folder, and what ends a turn."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from any4_jax.models.special_tokens import ADDED, SETTINGS, SPECIAL_MAP
from any4_jax.models.tokenizer import VOCABULARY, Tokenizer

transformers = pytest.importorskip("transformers")

WORDS = ("<unk>", "<s>", "</s>", "<bos>", "<eos>", "<pad>", "<|endoftext|>", "<|im_end|>", "a", "b", " ", "<", ">")
TEXTS = ("a b", "<s>a</s>", "<pad> <extra> a", "<|im_end|>b<|endoftext|>", "", "<bos>a <x> b", "a </s> b")


def vocabulary(added: tuple[str, ...] = ()) -> dict[str, Any]:
    """tokenizer.json of a BPE of single characters; of its words, only those in `added` are matched in a text."""
    ids = {word: index for index, word in enumerate(dict.fromkeys((*WORDS, *"<>/|_abdefimnopstux")))}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": ids[word], "content": word, "special": True, **plain} for word in added],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": ids, "merges": [], "unk_token": "<unk>", "fuse_unk": True},
    }


def folder_of(path: Path, files: dict[str, Any]) -> Path:
    for name, content in {VOCABULARY: vocabulary(("<unk>", "<s>", "</s>")), **files}.items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def entry(content: str, **flags: bool) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": content, "lstrip": False, "rstrip": False, "normalized": False, **flags}


CLASSES = ("Llama", "CodeLlama", "Gemma", "Cohere", "GPTNeoX", "Qwen2", "GPT2", "CodeGen", "Bloom")
FOLDERS: dict[str, dict[str, Any]] = {
    **{f"defaults of {name}": {SETTINGS: {"tokenizer_class": f"{name}TokenizerFast"}} for name in CLASSES},
    "the slow class's name": {SETTINGS: {"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}},
    "a null for a default": {SETTINGS: {"tokenizer_class": "GemmaTokenizer", "pad_token": None, "bos_token": "<s>"}},
    "no BOS wanted": {SETTINGS: {"tokenizer_class": "GemmaTokenizer", "add_bos_token": False}},
    "a post-processor for NeoX": {SETTINGS: {"tokenizer_class": "GPTNeoXTokenizer", "add_bos_token": True}},
    "a pad token that is new": {SETTINGS: {"tokenizer_class": "LlamaTokenizer", "pad_token": "<extra>"}},
    "one role with rules of its own": {
        SETTINGS: {"tokenizer_class": "LlamaTokenizer", "eos_token": entry("</s>", lstrip=True, rstrip=True)}
    },
    "rules of its own beside a decoder": {
        SETTINGS: {
            "tokenizer_class": "LlamaTokenizer",
            "eos_token": entry("</s>", lstrip=True, rstrip=True),
            "added_tokens_decoder": {"1": {"content": "<s>", "special": True}},
        }
    },
    "a role of a token that isn't special": {
        SETTINGS: {
            "tokenizer_class": "LlamaTokenizer",
            "pad_token": "<|im_end|>",
            "added_tokens_decoder": {"7": {"content": "<|im_end|>", "special": False}},
        }
    },
    "additional tokens": {
        SETTINGS: {"tokenizer_class": "LlamaTokenizer", "additional_special_tokens": ["<|im_end|>", "<x>", "<extra>"]}
    },
    "extra tokens": {
        SETTINGS: {"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": {"image_token": "<extra>"}}
    },
    "the map comes after the settings": {
        SETTINGS: {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "pad_token": "<pad>"},
        SPECIAL_MAP: {
            "bos_token": {"content": "<bos>", "lstrip": False, "rstrip": False, "normalized": False},
            "eos_token": "<eos>",
            "pad_token": None,
            "additional_special_tokens": ["<x>", {"content": "<extra>", "lstrip": True}],
        },
    },
    "the map adds to the settings": {
        SETTINGS: {"tokenizer_class": "LlamaTokenizer", "additional_special_tokens": ["<x>"]},
        SPECIAL_MAP: {"additional_special_tokens": ["<x>", "<extra>"]},
    },
    "the decoder's rules hold, and the map is not read": {
        SETTINGS: {
            "tokenizer_class": "LlamaTokenizer",
            "added_tokens_decoder": {
                "2": {"content": "</s>", "lstrip": True, "rstrip": True, "normalized": False, "special": True},
                "7": {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False, "special": True},
            },
        },
        SPECIAL_MAP: {"bos_token": "<bos>", "additional_special_tokens": ["<extra>"]},
        ADDED: {"<extra>": 999},
    },
    "added_tokens.json": {
        SETTINGS: {"tokenizer_class": "LlamaTokenizer"},
        SPECIAL_MAP: {"pad_token": "<x>"},
        ADDED: {"<extra>": len(vocabulary()["model"]["vocab"]) + 1, "<x>": len(vocabulary()["model"]["vocab"])},
    },
    "nothing but a vocabulary": {SETTINGS: {"tokenizer_class": "PreTrainedTokenizerFast"}},
}


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS)
def test_ids_and_roles_are_those_of_transformers(tmp_path: Path, files: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    folder = folder_of(tmp_path, files)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_folder(folder)
    assert ours is not None
    assert ours.vocab_size == len(theirs)
    assert ours.bos_id == theirs.bos_token_id
    if theirs.eos_token_id is not None:
        assert ours.eos_ids[0] == theirs.eos_token_id
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert [ours.encode(text, add_bos=False) for text in TEXTS] == [
        theirs.encode(text, add_special_tokens=False) for text in TEXTS
    ]
    assert [ours.decode(ours.encode(text)) for text in TEXTS] == [
        theirs.decode(theirs.encode(text), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for text in TEXTS
    ]
    assert ours == Tokenizer.from_files(ours.files)
    assert set(ours.files) == {VOCABULARY, *files}


def test_a_bos_that_looks_like_a_piece_of_a_post_processor(tmp_path: Path) -> None:
    """transformers itself can't load this one."""
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "a:$B", "additional_special_tokens": ["a:$B"]}
    settings["added_tokens_decoder"] = {str(len(vocabulary()["model"]["vocab"])): {"content": "a:$B", "special": True}}
    tokenizer = Tokenizer.from_folder(folder_of(tmp_path, {SETTINGS: settings}))
    assert tokenizer is not None
    assert tokenizer.encode("b") == [tokenizer.bos_id, *tokenizer.encode("b", add_bos=False)]


@pytest.mark.parametrize(
    "added, settings, expected",
    [
        (("<|im_end|>",), {}, ["<|im_end|>"]),
        (("</s>", "<|im_end|>"), {"eos_token": "</s>"}, ["</s>", "<|im_end|>"]),
        (("</s>", "<|im_end|>"), {"eos_token": "<|im_end|>"}, ["<|im_end|>", "</s>"]),
        (("<eos>", "<|endoftext|>"), {}, ["<eos>", "<|endoftext|>"]),
        ((), {}, []),
        ((), {"eot_token": "a", "eom_token": {"content": "b"}}, ["a", "b"]),
        ((), {"added_tokens_decoder": {"2": {"content": "</s>"}, "7": {"content": "<|im_end|>"}}}, ["<|im_end|>"]),
        ((), {"additional_special_tokens": ["<|end|>", "<|x|>"]}, ["<|end|>"]),
        ((), {"additional_special_tokens": ["<|end|>", "<|call|>", "<|return|>"]}, ["<|call|>", "<|return|>"]),
    ],
)
def test_ends_of_turns_are_known_by_their_text(added: tuple, settings: dict, expected: list[str]) -> None:
    files = {VOCABULARY: vocabulary(added), SETTINGS: settings}
    tokenizer = Tokenizer.from_files({name: json.dumps(content).encode() for name, content in files.items()})
    assert [tokenizer.decode([index], skip_special=False) for index in tokenizer.eos_ids] == expected


DEEP = "[" * 100_000 + "]" * 100_000
DAMAGE: dict[str, tuple[str, Any, str]] = {
    "bos a number": (SETTINGS, {"bos_token": 5}, "tokenizer_config.json: bos_token is 5, and .* needed"),
    "bos an object": (SETTINGS, {"bos_token": {"text": "<s>"}}, "bos_token is .*needed|bos_token lacks content"),
    "class a list": (SETTINGS, {"tokenizer_class": []}, r"tokenizer_class is \[\], and"),
    "add_bos a text": (SETTINGS, {"add_bos_token": "yes"}, "add_bos_token is 'yes', and"),
    "decoder a list": (SETTINGS, {"added_tokens_decoder": []}, r"added_tokens_decoder is \[\], and"),
    "decoder's id": (SETTINGS, {"added_tokens_decoder": {"-1": {"content": "x"}}}, "added_tokens_decoder"),
    "decoder's id a word": (SETTINGS, {"added_tokens_decoder": {"x": {"content": "x"}}}, "added_tokens_decoder"),
    "decoder's token": (SETTINGS, {"added_tokens_decoder": {"1": "<s>"}}, "added_tokens_decoder.1 is '<s>', and"),
    "decoder's flag": (
        SETTINGS,
        {"added_tokens_decoder": {"1": {"content": "<s>", "special": "no"}}},
        "added_tokens_decoder.1.special is 'no', and",
    ),
    "two ids of one token": (
        SETTINGS,
        {"added_tokens_decoder": {"1": {"content": "<s>"}, "2": {"content": "<s>"}}},
        "the id 2, which tokenizer.json gives 1",
    ),
    "additional a text": (SETTINGS, {"additional_special_tokens": "<x>"}, "additional_special_tokens is '<x>', and"),
    "no BOS to add": (SETTINGS, {"tokenizer_class": "LlamaTokenizer", "bos_token": None}, "names no bos_token"),
    "BOS of another model": (SPECIAL_MAP, {"bos_token": "<never>"}, "special_tokens_map.json is '<never>'"),
    "deep settings": (SETTINGS, DEEP, "tokenizer_config.json is nested too deeply"),
    "deep key": (SETTINGS, '{"bos_token": ' + DEEP + "}", "tokenizer_config.json is nested too deeply"),
    "map a list": (SPECIAL_MAP, [], "special_tokens_map.json holds a list"),
    "map's eos": (SPECIAL_MAP, {"eos_token": [2]}, r"special_tokens_map.json: eos_token is \[2\], and"),
    "added a list": (ADDED, [], "added_tokens.json holds a list"),
    "added id": (ADDED, {"<x>": -1}, "added_tokens.json: .*-1"),
    "added id elsewhere": (ADDED, {"<x>": 5}, "the id 5"),
    "template a number": (SETTINGS, {"chat_template": 5}, "chat_template is 5, and"),
    "deep vocabulary": (VOCABULARY, DEEP, "tokenizer.json can't be read"),
    "garbage": (VOCABULARY, "\x00", "tokenizer.json can't be read"),
    "no model": (VOCABULARY, {"version": "1.0"}, "tokenizer.json can't be read"),
    "merges of strangers": (
        VOCABULARY,
        {**vocabulary(), "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}},
        "tokenizer.json can't be read",
    ),
}


@pytest.mark.parametrize("name, content, words", DAMAGE.values(), ids=DAMAGE)
def test_what_files_say_is_checked(tmp_path: Path, name: str, content: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        Tokenizer.from_folder(folder_of(tmp_path, {name: content}))
    assert "\n" not in str(caught.value)
