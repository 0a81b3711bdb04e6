"""Converts tokens to text one by one, such that text once given is never taken back."""

from collections.abc import Callable, Sequence

# What decoders give for bytes that are not, or not yet, a complete UTF-8 character.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# An incomplete character has at most 3 bytes, which at most 3 tokens hold.
OPEN_TOKENS = 3

Decode = Callable[[Sequence[int]], str]


class IncrementalDecoder:
    """The text of a growing list of tokens, of which each `push` gives the part that has become certain.

    It decodes a window of few tokens, so its time is linear in their number. The window begins with the *context*:
    tokens whose text is certain and ends with a whole character. It is there because many tokenizers drop the space
    before the first word of what they decode. Then come the *open* tokens: their text ends with replacement
    characters, of which later tokens may still make a character. At most 3 tokens are open.

    Where bytes make no character, decoders differ: one gives a replacement for each byte, and some replace a whole run
    of byte tokens, good characters included, if it ends within a character. Of all ways to cut the open tokens in two,
    the text is that with the fewest replacements. So a stray byte spoils no character before or after it.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        """The tokens will follow `prompt`, whose own text is not given."""
        self._decode = decode
        self._context = _context(decode, prompt)
        self._before = decode(self._context)
        self._open: list[int] = []
        # The text of the open tokens, and how many of its characters have been given.
        self._text = ""
        self._given = 0

    def push(self, token: int) -> str:
        """Adds a token; returns the text that has become certain."""
        whole = self._added([*self._open, token])
        if whole == self._text and not self._added([token]):
            # A special token, or a space that the decoder drops from the beginning, as it does only once.
            if not self._before and self._decode([token, token]):
                self._context = [*self._context, token]
            return ""
        head, tail, text = self._cut(token, whole)
        certain = ""
        if head:
            certain, self._given = head[self._given :], 0
        self._open, self._text = tail, text
        certain += self._give(len(text.rstrip(REPLACEMENT)))
        if text.endswith(REPLACEMENT):
            while len(self._open) > OPEN_TOKENS:
                certain += self._drop_first()
        else:
            self._close()
        return certain

    def finish(self) -> str:
        """The text that was not certain yet; no token may follow."""
        return self._give(len(self._text))

    def _added(self, tokens: Sequence[int]) -> str:
        """The text that tokens add to the context."""
        text = self._decode([*self._context, *tokens])
        added = text[len(self._before) :] if text.startswith(self._before) else None
        if added is not None and REPLACEMENT not in added:
            return added
        # The context may be bytes itself, which a decoder that replaces whole runs would spoil.
        alone = self._decode([*tokens])
        return alone if added is None or alone.count(REPLACEMENT) < added.count(REPLACEMENT) else added

    def _cut(self, token: int, whole: str) -> tuple[str, list[int], str]:
        """The text of the open tokens that are to be closed, and the tokens that stay, with their text."""
        given = self._text[: self._given]
        best = ("", [*self._open, token], whole) if whole.startswith(given) else None
        for k in range(1, len(self._open) + 1):
            # The last cut takes back nothing, so there always is one.
            if best is not None and REPLACEMENT not in best[0] + best[2]:
                break
            head, tail = self._added(self._open[:k]), [*self._open[k:], token]
            text = self._added(tail)
            if head.startswith(given) and (best is None or _replacements(head, text) < _replacements(best[0], best[2])):
                best = head, tail, text
        assert best is not None
        return best

    def _give(self, end: int) -> str:
        """The text of the open tokens up to `end` that has not been given yet."""
        given, self._given = self._given, max(self._given, end)
        return self._text[given : self._given]

    def _drop_first(self) -> str:
        """Closes the first open token; returns the replacement characters that no longer wait for more."""
        text = self._added(self._open[1:])
        waiting = len(self._text) - self._given
        # If a character begins in the first token, the others' text begins with its rest, which has been given.
        kept = min(waiting, len(text) - len(text.rstrip(REPLACEMENT)))
        self._open, self._text, self._given = self._open[1:], text, len(text) - kept
        return REPLACEMENT * (waiting - kept)

    def _close(self) -> None:
        """The open tokens become the context, unless they decode to nothing on their own."""
        before = self._decode(self._open)
        if before:
            self._context, self._before = self._open, before
        self._open, self._text, self._given = [], "", 0


def _replacements(*texts: str) -> int:
    return sum(text.count(REPLACEMENT) for text in texts)


def _context(decode: Decode, prompt: Sequence[int]) -> list[int]:
    """The last token of a prompt that decodes to text without an open end; the whole prompt if only that does."""
    for token in reversed(prompt):
        if _is_whole(decode([token])):
            return [token]
    return [*prompt] if _is_whole(decode([*prompt])) else []


def _is_whole(text: str) -> bool:
    return bool(text) and not text.endswith(REPLACEMENT)
