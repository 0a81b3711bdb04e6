"""Reads which tokens are special and which are added to a vocabulary, with the precedence that `transformers` has."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import tokenizers
from pydantic import Field

from any4_jax.schema import Index, Schema, check, read_json

SETTINGS = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"

_ADVICE = "fetch it again"
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Token(Schema):
    """A token with the rules by which it is matched in a text."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False

    def added(self, special: bool = False) -> tokenizers.AddedToken:
        """The same for the `tokenizers` library."""
        flags = self.model_dump(exclude={"content"}, exclude_none=True)
        return tokenizers.AddedToken(self.content, **{**flags, "special": self.special or special})


_Named = str | Token | None


class _Special(Schema):
    """special_tokens_map.json, and the same keys of tokenizer_config.json."""

    bos_token: _Named = None
    eos_token: _Named = None
    unk_token: _Named = None
    sep_token: _Named = None
    pad_token: _Named = None
    cls_token: _Named = None
    mask_token: _Named = None
    additional_special_tokens: tuple[str | Token, ...] | None = None


class Settings(_Special):
    """tokenizer_config.json: the keys that this library uses."""

    tokenizer_class: str | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    added_tokens_decoder: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Token] | None = None
    extra_special_tokens: dict[str, str | Token] | tuple[str | Token, ...] | None = None
    prefix_token: _Named = None
    middle_token: _Named = None
    suffix_token: _Named = None
    eot_token: _Named = None
    eom_token: _Named = None


class _Added(Schema):
    ids: dict[str, Index]


@dataclass(frozen=True)
class _Class:
    """What a tokenizer class of `transformers` does with settings that a file leaves out.

    Attributes:
        roles: its default special tokens.
        fills: its default tokens for infilling, which join additional_special_tokens.
        around: None if the post-processor of tokenizer.json decides what surrounds a text; else the class replaces it
            by one that follows add_bos_token and add_eos_token, and these are their defaults.
    """

    roles: Mapping[str, str] = field(default_factory=dict)
    fills: Mapping[str, str] = field(default_factory=dict)
    around: tuple[bool, bool] | None = None


def _roles(bos: str | None, eos: str, unk: str, pad: str | None = None) -> dict[str, str]:
    roles = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": pad}
    return {role: token for role, token in roles.items() if token is not None}


_END = "<|endoftext|>"
_LLAMA = _roles("<s>", "</s>", "<unk>")
_FILLS = {
    "prefix_token": "\u2581<PRE>",
    "middle_token": "\u2581<MID>",
    "suffix_token": "\u2581<SUF>",
    "eot_token": "\u2581<EOT>",
}
# The names without "Fast", which make no difference.
_CLASSES: dict[str | None, _Class] = {
    "LlamaTokenizer": _Class(_LLAMA, around=(True, False)),
    "CodeLlamaTokenizer": _Class(_LLAMA, _FILLS, around=(True, False)),
    "GemmaTokenizer": _Class(_roles("<bos>", "<eos>", "<unk>", "<pad>"), around=(True, False)),
    "CohereTokenizer": _Class(_roles("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<UNK>"), around=(True, False)),
    "GPTNeoXTokenizer": _Class(_roles(_END, _END, _END), around=(False, False)),
    "Qwen2Tokenizer": _Class(_roles(None, _END, _END, _END)),
    "GPT2Tokenizer": _Class(_roles(_END, _END, _END)),
    "CodeGenTokenizer": _Class(_roles(_END, _END, _END)),
    "BloomTokenizer": _Class(_roles("<s>", "</s>", "<unk>", "<pad>")),
}


@dataclass(frozen=True)
class SpecialTokens:
    """What the files around a vocabulary say about its tokens.

    Attributes:
        roles: "bos_token", "eos_token", ... -> the text of the token; roles without a token are left out.
        additional: further special tokens.
        sources: role -> the file that names its token; roles that the tokenizer class fills are left out.
        add: tokens to add to the vocabulary, in this order; those that it has already get these rules.
        ids: id -> the text that the files give it.
        ends: tokens that end a turn of a chat, as far as the settings name them.
        around: whether BOS precedes and EOS follows a text; None leaves it to the post-processor of tokenizer.json.
    """

    roles: Mapping[str, str]
    additional: tuple[str, ...]
    sources: Mapping[str, str]
    add: tuple[tokenizers.AddedToken, ...]
    ids: Mapping[int, str]
    ends: tuple[str, ...]
    around: tuple[bool, bool] | None


def read_special_tokens(files: Mapping[str, bytes], known: Mapping[int, tokenizers.AddedToken]) -> SpecialTokens:
    """The special tokens that the files of a tokenizer name.

    Args:
        files: name -> content; of these, tokenizer_config.json, special_tokens_map.json and added_tokens.json are read.
        known: id -> token, the added tokens of tokenizer.json.

    Raises:
        ValueError: a file is no JSON, or a value has the wrong type; the message names file and key.
    """
    settings = _content(files, SETTINGS, Settings)
    kind = _CLASSES.get((settings.tokenizer_class or "").removesuffix("Fast"), _Class())
    named = {role: (getattr(settings, role), SETTINGS) for role in _ROLES if role in settings.model_fields_set}
    additional = list(settings.additional_special_tokens or ())
    if settings.added_tokens_decoder is not None:
        # These settings are complete, so transformers doesn't look at the older files.
        added = {int(index): token.added() for index, token in settings.added_tokens_decoder.items()}
    else:
        older = _content(files, SPECIAL_MAP, _Special)
        named |= {role: (getattr(older, role), SPECIAL_MAP) for role in _ROLES if role in older.model_fields_set}
        additional += [token for token in older.additional_special_tokens or () if token not in additional]
        texts = {_text(token) for token, _ in named.values()} | {_text(token) for token in additional}
        added = _older_added(files, texts) | dict(known)
    fills = [
        getattr(settings, name) if name in settings.model_fields_set else text for name, text in kind.fills.items()
    ]
    extra = settings.extra_special_tokens or ()
    more = [*additional, *fills, *(extra.values() if isinstance(extra, dict) else extra)]
    roles = {**kind.roles, **{role: token for role, (token, _) in named.items()}}
    special = [roles[role] for role in _ROLES if roles.get(role)] + [token for token in more if token]
    return SpecialTokens(
        roles={role: text for role in _ROLES if (text := _text(roles.get(role)))},
        additional=tuple(dict.fromkeys(text for token in more if (text := _text(token)))),
        sources={role: source for role, (_, source) in named.items()},
        add=tuple(_to_add(special, added, {token.content for token in known.values()})),
        ids={index: token.content for index, token in added.items()},
        ends=tuple(text for token in (settings.eot_token, settings.eom_token) if (text := _text(token))),
        around=_around(settings, kind),
    )


def _content(files: Mapping[str, bytes], name: str, schema: Any) -> Any:
    return check(schema, read_json(files[name], name, _ADVICE) if name in files else {}, name, _ADVICE)


def _text(token: _Named) -> str | None:
    return token.content if isinstance(token, Token) else token


def _older_added(files: Mapping[str, bytes], special: set[str | None]) -> dict[int, tokenizers.AddedToken]:
    """The tokens of added_tokens.json."""
    if ADDED not in files:
        return {}
    content = check(_Added, {"ids": read_json(files[ADDED], ADDED, _ADVICE)}, ADDED, _ADVICE)
    return {index: tokenizers.AddedToken(text, special=text in special) for text, index in content.ids.items()}


def _to_add(
    special: list[str | Token], added: Mapping[int, tokenizers.AddedToken], known: set[str]
) -> Iterator[tokenizers.AddedToken]:
    """First the tokens with an id, in order of their ids; then the special tokens that have none."""
    texts, given = {_text(token) for token in special}, {token.content for token in added.values()}
    for _, token in sorted(added.items()):
        token.special = token.special or token.content in texts
        yield token
    for token in special:
        entry = token if isinstance(token, Token) else Token(content=token, special=True)
        # A token with rules of its own replaces one that the vocabulary has; a bare text doesn't.
        if entry.content not in given and (entry is token or entry.content not in known):
            given.add(entry.content)
            yield entry.added(special=True)


def _around(settings: Settings, kind: _Class) -> tuple[bool, bool] | None:
    if kind.around is None:
        return None
    names = ("add_bos_token", "add_eos_token")
    bos, eos = (
        bool(getattr(settings, name)) if name in settings.model_fields_set else default
        for name, default in zip(names, kind.around, strict=True)
    )
    return bos, eos
