"""Reads the tokenizers of older repositories, such as OPT's: a vocab.json and a merges.txt, and no tokenizer.json."""

import json
from collections.abc import Mapping
from typing import Any

from any4_jax.models.special_tokens import SETTINGS, Settings, read_special_tokens
from any4_jax.schema import Index, Schema, check, read_json

VOCAB = "vocab.json"
MERGES = "merges.txt"
FILES = (VOCAB, MERGES)

_ADVICE = "fetch it again"
# Other classes with these two files have rules of their own.
_CLASS = "GPT2Tokenizer"


class _Vocab(Schema):
    ids: dict[str, Index]


def as_tokenizer_json(files: Mapping[str, bytes]) -> bytes | None:
    """The tokenizer.json that `transformers` makes of the other files; None if they aren't those of GPT2Tokenizer.

    Raises:
        ValueError: a file is damaged, a merge is no pair of tokens, or the BOS to add is not in the vocabulary.
    """
    if any(name not in files for name in (*FILES, SETTINGS)):
        return None
    settings = check(Settings, read_json(files[SETTINGS], SETTINGS, _ADVICE), SETTINGS, _ADVICE)
    if (settings.tokenizer_class or "").removesuffix("Fast") != _CLASS:
        return None
    ids = check(_Vocab, {"ids": read_json(files[VOCAB], VOCAB, _ADVICE)}, VOCAB, _ADVICE).ids
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    bos = read_special_tokens(files, {}).roles.get("bos_token") if settings.add_bos_token else None
    content: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "add_prefix_space": bool(settings.add_prefix_space)},
        "post_processor": None if bos is None else _after(bos, ids),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "vocab": ids,
            "merges": _merges(files[MERGES], ids),
        },
    }
    return json.dumps(content).encode()


def _merges(content: bytes, ids: Mapping[str, int]) -> list[list[str]]:
    try:
        # The first line names the version, the last one is empty.
        lines = content.decode().split("\n")[1:-1]
    except UnicodeDecodeError as error:
        raise ValueError(f"{MERGES} is not UTF-8 ({error.reason} at byte {error.start}); {_ADVICE}") from None
    pairs = [line.split() for line in lines]
    for number, pair in enumerate(pairs, 2):
        if len(pair) != 2 or any(token not in ids for token in (*pair, "".join(pair))):
            raise ValueError(
                f"{MERGES}: line {number} is {lines[number - 2][:60]!r}, and two tokens of {VOCAB} whose union is a "
                f"token are needed; {_ADVICE}"
            )
    return pairs


def _after(bos: str, ids: Mapping[str, int]) -> dict[str, Any]:
    """The post-processor that begins a text with BOS."""
    if bos not in ids:
        raise ValueError(f"bos_token of {SETTINGS} is {bos[:60]!r}, which {VOCAB} lacks; use files of one model")
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, second],
        "special_tokens": {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}},
    }
