"""Tells by their text which tokens end a turn of a chat, because many files name only the token that ends a text."""

from collections.abc import Iterable, Mapping

import tokenizers

# Texts that have no other use, so an added token with this text ends a turn whatever its flags say.
ENDS_OF_TURN = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<end_of_turn>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|END_OF_TURN_TOKEN|>",
        "<end_of_utterance>",
        "<EOT>",
        "_<EOT>",
        "\u2581<EOT>",
        "[EOT]",
    }
)
# An ordinary added token may have these texts too: Gemma has the HTML tag </s>.
_ENDS_OF_TEXT = frozenset(
    {"<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<\uff5cend\u2581of\u2581sentence\uff5c>"}
)
# Where a model has all of these, the first one only separates the messages of one turn.
_SEPARATOR, *_WITH_SEPARATOR = "<|end|>", "<|return|>", "<|call|>"


def end_ids(added: Mapping[int, tokenizers.AddedToken], named: Iterable[int]) -> tuple[int, ...]:
    """The ids of the tokens that end a text or a turn: those that the files name, then the others by their text.

    Args:
        added: id -> token, all added tokens of the vocabulary.
        named: the ids of the tokens that the files name.
    """
    texts = {token.content for token in added.values()}
    apart = texts.issuperset(_WITH_SEPARATOR)
    found = [
        index
        for index, token in sorted(added.items())
        if token.content in ENDS_OF_TURN
        and not (apart and token.content == _SEPARATOR)
        or token.special
        and token.content in _ENDS_OF_TEXT
    ]
    return tuple(dict.fromkeys([*named, *found]))
