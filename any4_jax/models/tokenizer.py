"""Converts text to token ids and back, with the tokenizer files of Hugging Face models."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

VOCABULARY = "tokenizer.json"
SETTINGS = "tokenizer_config.json"

# For these classes, `transformers` replaces the post-processor by one that follows add_bos_token and add_eos_token;
# for all others it ignores the two and uses the post-processor of tokenizer.json.
_REBUILDING_CLASSES = frozenset(
    {"LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast"}
)


class Tokenizer:
    """A tokenizer of the `tokenizers` library with the settings of its model; immutable.

    Only JSON is read: Python code of a model repository never runs. Equality and hash are those of the files' content,
    so a tokenizer can be static data of a compiled function.

    Attributes:
        files: name -> content of every file that `from_files` needs to rebuild it.
        bos_id: the id of the token that begins a text, or None.
        eos_ids: the ids of the tokens that end a text; may be empty.
        vocab_size: the number of ids, including added tokens.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """See `from_files`."""
        if VOCABULARY not in files:
            raise ValueError(f"the tokenizer files are {sorted(files)}, and {VOCABULARY} is needed; add it")
        self._files = {name: bytes(content) for name, content in sorted(files.items())}
        digest = hashlib.sha256()
        for name, content in self._files.items():
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
        self._digest = digest.digest()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self._files[VOCABULARY].decode())
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{VOCABULARY} can't be read ({error}); fetch the file again") from error
        settings = _settings(self._files)
        # The stored limits are those of the last training run; `transformers` ignores them too.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        _add_missing(self._tokenizer, settings)
        self.bos_id = self._special(settings, "bos_token")
        eos_id = self._special(settings, "eos_token")
        self.eos_ids: tuple[int, ...] = () if eos_id is None else (eos_id,)
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._wrap: tuple[bool, bool] | None = None
        if settings.get("tokenizer_class") in _REBUILDING_CLASSES:
            self._wrap = (
                bool(settings.get("add_bos_token", True)),
                bool(settings.get("add_eos_token", False)),
            )

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "Tokenizer":
        """A tokenizer from file contents: `tokenizer.json`, and optionally `tokenizer_config.json`.

        Raises:
            ValueError: tokenizer.json is missing, a file is damaged, or the two contradict each other.
        """
        return cls(files)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer | None":
        """The tokenizer of a model's folder; None if it has no tokenizer.json."""
        names = [name for name in (VOCABULARY, SETTINGS) if (folder / name).is_file()]
        if VOCABULARY not in names:
            return None
        return cls({name: (folder / name).read_bytes() for name in names})

    @property
    def files(self) -> dict[str, bytes]:
        """Name -> content; a copy."""
        return dict(self._files)

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """The token ids of a text. A special token that is written in the text ("<s>") becomes its id.

        Args:
            text: any string.
            add_bos: None adds the tokens that the model's settings ask for, as `transformers`' AutoTokenizer does;
                True begins with exactly one BOS; False adds nothing.

        Raises:
            ValueError: add_bos is True and the tokenizer has no BOS.
        """
        if add_bos is None and self._wrap is None:
            return list(self._tokenizer.encode(text, add_special_tokens=True).ids)
        ids = list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        wanted_bos, wanted_eos = self._wrap if add_bos is None and self._wrap else (add_bos, False)
        if wanted_bos:
            if self.bos_id is None:
                raise ValueError("a BOS is asked for, and the tokenizer has none; pass add_bos=False")
            # If the text begins with its own BOS and the caller asked for exactly one, that BOS is the one.
            if not (add_bos and ids[:1] == [self.bos_id]):
                ids.insert(0, self.bos_id)
        return [*ids, *self.eos_ids] if wanted_eos else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids; spaces before punctuation stay, whatever clean-up the settings ask for."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special))

    def _special(self, settings: Mapping[str, Any], name: str) -> int | None:
        token = settings.get(name)
        content = token.get("content") if isinstance(token, Mapping) else token
        if content is None:
            return None
        index = self._tokenizer.token_to_id(content)
        if index is None:
            raise ValueError(f"{name} of {SETTINGS} is {content!r}, which {VOCABULARY} lacks; use files of one model")
        return int(index)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, sha256={self._digest.hex()[:12]})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._files,)


def _settings(files: Mapping[str, bytes]) -> dict[str, Any]:
    if SETTINGS not in files:
        return {}
    try:
        settings = json.loads(files[SETTINGS])
    except ValueError as error:
        raise ValueError(f"{SETTINGS} is not JSON ({error}); fetch the file again") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{SETTINGS} holds a {type(settings).__name__}, and an object is needed; fetch it again")
    return settings


def _add_missing(tokenizer: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    """Adds the tokens that only tokenizer_config.json has, at the ids that it gives them."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    declared = settings.get("added_tokens_decoder", {})
    for index, entry in sorted((int(index), entry) for index, entry in declared.items()):
        content = entry["content"]
        if tokenizer.token_to_id(content) is None:
            known = {flag: bool(entry[flag]) for flag in flags if flag in entry}
            tokenizer.add_tokens([tokenizers.AddedToken(content, **known)])
        if tokenizer.token_to_id(content) != index:
            raise ValueError(
                f"{SETTINGS} gives {content!r} the id {index}, which {VOCABULARY} gives "
                f"{tokenizer.token_to_id(content)}; use files of one model"
            )
