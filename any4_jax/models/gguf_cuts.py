"""How byte-level tokenizers of GGUF files cut a text into pieces: the rules behind tokenizer.ggml.pre."""

from dataclasses import dataclass

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_WORDS = _CONTRACTED + r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ASCII_SIGNS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""


@dataclass(frozen=True)
class Cuts:
    """The rules of one kind of pre-tokenizer.

    Attributes:
        regexes: regular expressions that cut the text, each applied to the pieces of the one before.
        whole_words_first: a piece that is a token is taken whole, without merges; and a text begins with BOS unless
            the file says otherwise.
        composed: the text is brought into Unicode's composed form (NFC) first.
    """

    regexes: tuple[str, ...]
    whole_words_first: bool = False
    composed: bool = False


_DIGITS_ALONE = Cuts((r"\p{N}", _GPT2))
_PLAIN = Cuts((_GPT2,))
_GROUPED = _WORDS + r"\p{N}{1,3}" + _SIGNS
_LLAMA3 = Cuts((_GROUPED,), whole_words_first=True)
_SINGLE = _WORDS + r"\p{N}" + _SIGNS

CUTS: dict[str, Cuts] = {
    "default": Cuts((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "roberta-bpe"), _PLAIN),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS_ALONE),
    **dict.fromkeys(("llama-bpe", "llama-v3", "llama3", "falcon3"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), Cuts((_GROUPED,))),
    "qwen2": Cuts((_SINGLE,), composed=True),
    **dict.fromkeys(("stablelm2", "megrez"), Cuts((_SINGLE,))),
    "qwen35": Cuts(
        (_CONTRACTED + r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES,),
        composed=True,
    ),
    "tekken": Cuts(
        (
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
            rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|" + _SPACES,
        ),
        whole_words_first=True,
    ),
    "falcon": Cuts((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "deepseek-coder": Cuts(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
    ),
    "deepseek-v3": Cuts(
        (
            r"\p{N}{1,3}",
            "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            _ASCII_SIGNS + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES,
        )
    ),
}
