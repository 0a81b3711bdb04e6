"""Converts text to token ids and back, with the tokenizer files of Hugging Face models."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from tokenizers.processors import TemplateProcessing

from any4_jax.models import chat, vocab_merges
from any4_jax.models.end_tokens import end_ids
from any4_jax.models.special_tokens import ADDED, SETTINGS, SPECIAL_MAP, SpecialTokens, read_special_tokens
from any4_jax.one_line import one_line
from any4_jax.regular_file import read_regular

VOCABULARY = "tokenizer.json"
FILES = (VOCABULARY, *vocab_merges.FILES, SETTINGS, SPECIAL_MAP, ADDED, *chat.FILES)

T = TypeVar("T")


class Tokenizer:
    """A tokenizer of the `tokenizers` library with the settings of its model; immutable.

    Only JSON and chat templates are read: Python code of a model repository never runs. Equality and hash are those of
    the files' content, so a tokenizer can be static data of a compiled function.

    Attributes:
        files: name -> content of every file that `from_files` needs to rebuild it.
        bos_id: the id of the token that begins a text, or None.
        eos_ids: the ids of the tokens that end a text or a turn of a chat: first those that the files name, then added
            tokens that are known by their text, such as <|im_end|>; may be empty.
        vocab_size: the number of ids, including added tokens.
        chat_template: the Jinja template that turns messages into a text, or None.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """See `from_files`."""
        files = _with_vocabulary(files)
        if VOCABULARY not in files:
            raise ValueError(f"the tokenizer files are {sorted(files)}, and {VOCABULARY} is needed; add it")
        self._files = {name: bytes(content) for name, content in sorted(files.items())}
        digest = hashlib.sha256()
        for name, content in self._files.items():
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
        self._digest = digest.digest()
        self._tokenizer = _said(
            f"{VOCABULARY} can't be read",
            "fetch the file again",
            lambda: tokenizers.Tokenizer.from_str(self._files[VOCABULARY].decode()),
        )
        # The stored limits are those of the last training run; `transformers` ignores them too.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        special = read_special_tokens(self._files, self._tokenizer.get_added_tokens_decoder())
        _add(self._tokenizer, special)
        self._roles, self._additional = dict(special.roles), special.additional
        self.bos_id = self._id(special.roles.get("bos_token"))
        ends = (self._id(text) for text in (special.roles.get("eos_token"), *special.ends))
        self.eos_ids: tuple[int, ...] = end_ids(
            self._tokenizer.get_added_tokens_decoder(), [index for index in ends if index is not None]
        )
        if special.around is not None:
            self._tokenizer.post_processor = self._surrounding(*special.around)
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.chat_template = chat.template_of(self._files)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "Tokenizer":
        """A tokenizer from file contents: tokenizer.json and, where the model has them, tokenizer_config.json,
        special_tokens_map.json, added_tokens.json, chat_template.jinja and chat_template.json.

        A GPT2Tokenizer without a tokenizer.json, as OPT has, comes from its vocab.json and merges.txt.

        Raises:
            ValueError: tokenizer.json is missing, a file is damaged, or two contradict each other.
        """
        return cls(files)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer | None":
        """The tokenizer of a model's folder; None if it has no tokenizer.json, nor what `from_files` takes instead.

        Raises:
            ValueError: see `from_files`; or one of the names is no regular file.
        """
        paths = [folder / name for name in FILES if (folder / name).exists()]
        files = _with_vocabulary({path.name: read_regular(path) for path in paths})
        return cls(files) if VOCABULARY in files else None

    @property
    def files(self) -> dict[str, bytes]:
        """Name -> content; a copy."""
        return dict(self._files)

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """The token ids of a text. A special token that is written in the text ("<s>") becomes its id.

        Args:
            text: any string of Unicode characters.
            add_bos: None adds the tokens that the model's settings ask for, as `transformers`' AutoTokenizer does;
                True begins with exactly one BOS; False adds nothing.

        Raises:
            TypeError: text is no string.
            ValueError: add_bos is True and the tokenizer has no BOS; the text holds half of a surrogate pair, as
                Python writes bytes that aren't UTF-8; or the vocabulary has no token for a part of it.
        """
        chat.refuse_surrogates(text, "the text")
        ids = _said(
            "the text can't be encoded",
            "give another text, or a tokenizer.json with an unknown token",
            lambda: list(self._tokenizer.encode(text, add_special_tokens=add_bos is None).ids),
        )
        if not add_bos:
            return ids
        if self.bos_id is None:
            raise ValueError("a BOS is asked for, and the tokenizer has none; pass add_bos=False")
        # If the text begins with its own BOS, that BOS is the one.
        return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids; spaces before punctuation stay, whatever clean-up the settings ask for.

        Raises:
            ValueError: an id is negative or has more than 32 bits; other ids that the vocabulary lacks have no text.
        """
        numbers = [int(i) for i in ids]
        return _said(
            "the token ids can't be decoded",
            f"give ids from 0 to {self.vocab_size - 1}",
            lambda: str(self._tokenizer.decode(numbers, skip_special_tokens=skip_special)),
        )

    def apply_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The text of a chat, as the model's chat template writes it.

        Args:
            messages: a list of {"role": str, "content": str}, oldest first.
            add_generation_prompt: whether the text ends with what begins the model's answer.

        Raises:
            ValueError: there is no chat template, the messages have another form, or the template refuses them, is no
                valid Jinja, fails, or needs more steps or memory than a chat can need.
        """
        if self.chat_template is None:
            raise ValueError("the tokenizer has no chat template; encode the text of the chat, or add its template")
        special: dict[str, Any] = dict(self._roles)
        if self._additional:
            special["additional_special_tokens"] = list(self._additional)
        return chat.render(self.chat_template, messages, special, add_generation_prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """The token ids of `apply_chat`'s text; its template writes the BOS, so none is added."""
        return self.encode(self.apply_chat(messages, add_generation_prompt=add_generation_prompt), add_bos=False)

    def _id(self, text: str | None) -> int | None:
        return None if text is None else self._tokenizer.token_to_id(text)

    def _surrounding(self, bos: bool, eos: bool) -> TemplateProcessing:
        """The post-processor that puts BOS before and EOS after a text."""
        special = []
        for name, wanted in (("bos", bos), ("eos", eos)):
            text = self._roles.get(f"{name}_token")
            if wanted and text is None:
                raise ValueError(
                    f"{SETTINGS} asks for add_{name}_token and names no {name}_token; add one of the two keys: "
                    f'"{name}_token": its text, or "add_{name}_token": false'
                )
            if wanted:
                # Under a name of ours, because a text with a colon would be read as a name and a type.
                special.append({"id": name, "ids": [self._id(text)], "tokens": [text]})
        single = ["bos"] * bos + ["$A"] + ["eos"] * eos
        pair = [*single, *("$B" if piece == "$A" else piece for piece in single)]
        return TemplateProcessing(single=single, pair=pair, special_tokens=special)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, sha256={self._digest.hex()[:12]})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._files,)


def _with_vocabulary(files: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """The files with a tokenizer.json in place of the two files that older repositories have, where that's possible."""
    made = None if VOCABULARY in files else vocab_merges.as_tokenizer_json(files)
    kept = {name: content for name, content in files.items() if name not in vocab_merges.FILES}
    return kept if made is None else {**kept, VOCABULARY: made}


def _said(problem: str, advice: str, work: Callable[[], T]) -> T:
    """The result of work in the `tokenizers` library, whose errors become one sentence.

    The library raises bare Exception; a failed assertion in its Rust code arrives as a BaseException.
    """
    try:
        return work()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ValueError(f"{problem} ({one_line(error)}); {advice}") from error


def _add(tokenizer: tokenizers.Tokenizer, special: SpecialTokens) -> None:
    """Adds the tokens that only the other files have, at the ids that they give them."""
    declared = set(special.ids.values())
    for role in ("bos_token", "eos_token"):
        text = special.roles.get(role)
        if text is None or role not in special.sources or text in declared:
            continue
        if tokenizer.token_to_id(text) is None:
            raise ValueError(
                f"{role} of {special.sources[role]} is {text[:60]!r}, which {VOCABULARY} lacks; use files of one model"
            )
    tokenizer.add_tokens(list(special.add))
    for index, text in special.ids.items():
        if tokenizer.token_to_id(text) != index:
            raise ValueError(
                f"{SETTINGS} or {ADDED} gives {text[:60]!r} the id {index}, which {VOCABULARY} gives "
                f"{tokenizer.token_to_id(text)}; use files of one model"
            )
