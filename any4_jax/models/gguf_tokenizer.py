"""Converts the tokenizer in a GGUF file to the tokenizer.json that Hugging Face would have."""

import json
from collections.abc import Mapping
from typing import Any

from any4_jax.models.special_tokens import SETTINGS
from any4_jax.models.tokenizer import VOCABULARY, Tokenizer

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> the regular expressions that split the text, each applied to the pieces of the one before.
_CUTS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
_WHOLE_WORDS_FIRST = frozenset({"llama-bpe", "llama-v3", "llama3"})


def read_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer that the metadata of a GGUF file describes; None if it describes none.

    Raises:
        ValueError: its model is neither "gpt2" (byte-level BPE) nor "llama" (SentencePiece BPE), the rules of its
            pre-tokenizer aren't known, or a list is missing.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        return None
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model {kind!r} is not supported, only 'gpt2' and 'llama' are")
    tokens = _needed(metadata, "tokens")
    parts = _byte_level(metadata, tokens) if kind == "gpt2" else _sentencepiece(metadata, tokens)
    names = {f"{role}_token": metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos")}
    settings = {name: tokens[index] for name, index in names.items() if index is not None}
    # SentencePiece models and Llama 3 begin a text with BOS unless the file says otherwise; other models don't.
    bos = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS_FIRST
    vocabulary = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(metadata, tokens),
        "post_processor": _template(
            settings.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", bos) else None,
            settings.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token", False) else None,
            {token: index for index, token in enumerate(tokens)},
        ),
        **parts,
    }
    if template := metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    files = {VOCABULARY: vocabulary, SETTINGS: settings}
    return Tokenizer({name: json.dumps(content, ensure_ascii=False).encode() for name, content in files.items()})


def _needed(metadata: Mapping[str, Any], name: str) -> Any:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        raise ValueError(f"the GGUF file lacks tokenizer.ggml.{name}, which its tokenizer needs; convert it again")
    return value


def _added(metadata: Mapping[str, Any], tokens: list[str]) -> list[dict[str, Any]]:
    """Tokens that are matched in the text before all others: control tokens, and those that a user added."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": index, "content": tokens[index], **plain, "special": kind == _CONTROL}
        for index, kind in enumerate(metadata.get("tokenizer.ggml.token_type", []))
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _template(bos: str | None, eos: str | None, ids: Mapping[str, int]) -> dict[str, Any] | None:
    special = [token for token in (bos, eos) if token is not None]
    if not special:
        return None

    def around(sequence: str, kind: int) -> list[dict[str, Any]]:
        pieces: list[dict[str, Any]] = [{"Sequence": {"id": sequence, "type_id": kind}}]
        if bos is not None:
            pieces.insert(0, {"SpecialToken": {"id": bos, "type_id": kind}})
        if eos is not None:
            pieces.append({"SpecialToken": {"id": eos, "type_id": kind}})
        return pieces

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in special},
    }


def _bpe(tokens: list[str], merges: list[list[str]], **options: Any) -> dict[str, Any]:
    fixed = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    vocab = {token: index for index, token in enumerate(tokens)}
    return {"type": "BPE", **fixed, **options, "vocab": vocab, "merges": merges}


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """BPE over bytes spelled as printable characters, as GPT-2 introduced it."""
    cut = metadata.get("tokenizer.ggml.pre")
    if cut not in _CUTS:
        raise ValueError(f"tokenizer.ggml.pre {cut!r} has unknown rules, only {', '.join(_CUTS)} are supported")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in _CUTS[cut]
    ]
    # In a byte-level vocabulary no token contains a space, so the first space separates the pair.
    merges = [merge.split(" ", 1) for merge in _needed(metadata, "merges")]
    options = {"unk_token": None, "fuse_unk": False, "byte_fallback": False}
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "decoder": byte_level,
        "model": _bpe(tokens, merges, **options, ignore_merges=cut in _WHOLE_WORDS_FIRST),
    }


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """BPE over characters, with bytes for unknown ones; merges are derived from the scores in the file.

    SentencePiece always joins the neighbours whose union has the highest score. So every way to split a token into
    two tokens is a merge, ranked by the score of the union.
    """
    scores = _needed(metadata, "scores")
    ids = {token: index for index, token in enumerate(tokens)}
    merges = [
        (-scores[index], index, ids[token[:cut]], ids[token[cut:]])
        for index, token in enumerate(tokens)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    restore = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    options = {
        "unk_token": None if unknown is None else tokens[unknown],
        "fuse_unk": True,
        "byte_fallback": True,
    }
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": _SPACE}] * prefix + [replace],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [restore, {"type": "ByteFallback"}, {"type": "Fuse"}] + [strip] * prefix,
        },
        "model": _bpe(
            tokens,
            [[tokens[left], tokens[right]] for *_, left, right in sorted(merges)],
            **options,
            ignore_merges=False,
        ),
    }
