"""Converts token ids to text, piece by piece."""

from collections.abc import Callable, Sequence

# What decoders emit for bytes that are not, or not yet, a complete UTF-8 character.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of a growing continuation, emitted as soon as its characters are complete.

    Tokens are decoded together with their prompt, because many tokenizers drop the space before the first word of a
    text: only the context shows that the continuation starts with a space.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], emit: Callable[[str], None]
    ) -> None:
        self._decode = decode
        self._prompt = prompt
        self._emit = emit
        self._tokens: list[int] = []
        self._sent = ""

    @staticmethod
    def whole(decode: Callable[[Sequence[int]], str], prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """The text that `tokens` add to `prompt`."""
        before, after = decode([*prompt]), decode([*prompt, *tokens])
        return after[len(before) :] if after.startswith(before) else decode([*tokens])

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds tokens, and emits the text that is complete."""
        self._tokens.extend(tokens)
        text = self.whole(self._decode, self._prompt, self._tokens)
        # A character may span tokens: its first bytes decode to REPLACEMENT at the end until the rest comes.
        self._send(text.rstrip(REPLACEMENT))

    def finish(self) -> str:
        """Emits the text that was held back, and returns the whole text."""
        text = self.whole(self._decode, self._prompt, self._tokens)
        self._send(text)
        return text

    def _send(self, text: str) -> None:
        if len(text) > len(self._sent) and text.startswith(self._sent):
            self._emit(text[len(self._sent) :])
            self._sent = text
