"""Converts the tokenizer in a GGUF file to the tokenizer.json that Hugging Face would have."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from any4_jax.models.end_tokens import ENDS_OF_TURN
from any4_jax.models.gguf_cuts import CUTS
from any4_jax.models.special_tokens import SETTINGS
from any4_jax.models.tokenizer import VOCABULARY, Tokenizer
from any4_jax.schema import Index, Name, Schema, check

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"
_PREFIX = "tokenizer.ggml."
_SOURCE, _ADVICE = "the GGUF file", "convert it again"
# SentencePiece makes tokens of at most 16 characters unless it is told otherwise; every cut of a token is tried.
_LONGEST = 1000


class _Stored(Schema):
    """The metadata of a tokenizer; the keys begin with "tokenizer.ggml."."""

    model_config = ConfigDict(alias_generator=lambda name: _PREFIX + name)

    model: str
    pre: Name | None = None
    tokens: Annotated[tuple[str, ...], Field(min_length=1)]
    token_type: tuple[int, ...] | None = None
    scores: tuple[float, ...] | None = None
    merges: tuple[str, ...] | None = None
    bos_token_id: Index | None = None
    eos_token_id: Index | None = None
    eot_token_id: Index | None = None
    eom_token_id: Index | None = None
    unknown_token_id: Index | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_space_prefix: bool | None = None
    chat_template: str | None = Field(default=None, alias="tokenizer.chat_template")


def read_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer that the metadata of a GGUF file describes; None if it describes none.

    Raises:
        ValueError: its model is neither "gpt2" (byte-level BPE) nor "llama" (SentencePiece BPE), the rules of its
            pre-tokenizer aren't known, or its keys are missing, of a wrong type or contradict each other.
    """
    kind = metadata.get(f"{_PREFIX}model")
    if kind is None:
        return None
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{_PREFIX}model {repr(kind)[:60]} is not supported, only 'gpt2' and 'llama' are")
    content = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    stored = check(_Stored, content, _SOURCE, _ADVICE)
    tokens = _distinct(stored.tokens)
    _check_lengths(stored)
    parts = _byte_level(stored, tokens) if kind == "gpt2" else _sentencepiece(stored, tokens)
    named = {
        "bos_token": stored.bos_token_id,
        "eos_token": stored.eos_token_id,
        "eot_token": stored.eot_token_id,
        "eom_token": stored.eom_token_id,
    }
    settings = {name: tokens[index] for name, index in named.items() if index is not None}
    # SentencePiece models and Llama 3 begin a text with BOS unless the file says otherwise; other models don't.
    bos = kind == "llama" or CUTS[str(stored.pre)].whole_words_first
    vocabulary = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(stored, tokens),
        "post_processor": _template(
            settings.get("bos_token") if _or(stored.add_bos_token, bos) else None,
            settings.get("eos_token") if stored.add_eos_token else None,
            {token: index for index, token in enumerate(tokens)},
        ),
        **parts,
    }
    if stored.chat_template is not None:
        settings["chat_template"] = stored.chat_template
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    files = {VOCABULARY: vocabulary, SETTINGS: settings}
    return Tokenizer({name: json.dumps(content, ensure_ascii=False).encode() for name, content in files.items()})


def _or(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _distinct(tokens: tuple[str, ...]) -> list[str]:
    """The tokens; empty ones get a name, as llama.cpp gives them."""
    named = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    first: dict[str, int] = {}
    for index, token in enumerate(named):
        if first.setdefault(token, index) != index:
            raise ValueError(
                f"{_SOURCE}: {_PREFIX}tokens has {token[:60]!r} at {first[token]} and at {index}, and distinct tokens "
                f"are needed; {_ADVICE}"
            )
    return named


def _check_lengths(stored: _Stored) -> None:
    """Refuses lists and ids that don't fit the tokens."""
    count = len(stored.tokens)
    for name in ("token_type", "scores"):
        values = getattr(stored, name)
        if values is not None and len(values) != count:
            raise ValueError(
                f"{_SOURCE}: {_PREFIX}{name} has {len(values)} values, and one for each of the {count} tokens is "
                f"needed; {_ADVICE}"
            )
    for name in ("bos", "eos", "eot", "eom", "unknown"):
        index = getattr(stored, f"{name}_token_id")
        if index is not None and index >= count:
            raise ValueError(
                f"{_SOURCE}: {_PREFIX}{name}_token_id is {index}, and an id below {count}, the number of tokens, is "
                f"needed; {_ADVICE}"
            )


def _needed(stored: _Stored, name: str) -> Any:
    value = getattr(stored, name)
    if value is None:
        raise ValueError(f"{_SOURCE} lacks {_PREFIX}{name}, which its tokenizer needs; {_ADVICE}")
    return value


def _added(stored: _Stored, tokens: list[str]) -> list[dict[str, Any]]:
    """Tokens that are matched in the text before all others: control tokens, and those that a user added.

    A token whose text ends a turn of a chat is a control token, whatever its type says.
    """
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    kinds = stored.token_type or (0,) * len(tokens)
    return [
        {"id": index, "content": token, **plain, "special": kind == _CONTROL or token in ENDS_OF_TURN}
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED) or token in ENDS_OF_TURN
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


def _byte_level(stored: _Stored, tokens: list[str]) -> dict[str, Any]:
    """BPE over bytes spelled as printable characters, as GPT-2 introduced it."""
    cuts = CUTS.get(str(stored.pre))
    if cuts is None:
        raise ValueError(f"{_PREFIX}pre {stored.pre!r} has unknown rules, only {', '.join(CUTS)} are supported")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in cuts.regexes
    ]
    merges = _pairs(_needed(stored, "merges"), set(tokens))
    options = {"unk_token": None, "fuse_unk": False, "byte_fallback": False}
    return {
        "normalizer": {"type": "NFC"} if cuts.composed else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "decoder": byte_level,
        "model": _bpe(tokens, merges, **options, ignore_merges=cuts.whole_words_first),
    }


def _pairs(merges: tuple[str, ...], tokens: set[str]) -> list[list[str]]:
    """The two tokens of each merge; in a byte-level vocabulary no token contains a space, so one separates them."""
    pairs = [merge.split(" ", 1) for merge in merges]
    for index, pair in enumerate(pairs):
        if len(pair) != 2 or not tokens.issuperset((*pair, "".join(pair))):
            raise ValueError(
                f"{_SOURCE}: {_PREFIX}merges.{index} is {merges[index][:60]!r}, and two tokens that a space separates "
                f"and whose union is a token are needed; {_ADVICE}"
            )
    return pairs


def _sentencepiece(stored: _Stored, tokens: list[str]) -> dict[str, Any]:
    """BPE over characters, with bytes for unknown ones; merges are derived from the scores in the file.

    SentencePiece always joins the neighbours whose union has the highest score. So every way to split a token into
    two tokens is a merge, ranked by the score of the union.
    """
    scores = _needed(stored, "scores")
    longest = max(tokens, key=len)
    if len(longest) > _LONGEST:
        raise ValueError(
            f"{_SOURCE}: a token of {_PREFIX}tokens has {len(longest)} characters ({longest[:20]!r}...), and at most "
            f"{_LONGEST} are supported; {_ADVICE}"
        )
    ids = {token: index for index, token in enumerate(tokens)}
    merges = [
        (-scores[index], index, ids[token[:cut]], ids[token[cut:]])
        for index, token in enumerate(tokens)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    prefix = _or(stored.add_space_prefix, True)
    unknown = stored.unknown_token_id
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
