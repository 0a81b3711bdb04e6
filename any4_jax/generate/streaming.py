"""The text of a growing continuation, piece by piece, up to the first stop string."""

from collections.abc import Callable, Sequence

from any4_jax.generate.decoding import Decode, IncrementalDecoder


class StopStrings:
    """Ends a text before the first stop string, the one that is complete first.

    Nothing that a stop string may begin with is let through before it is decided; so at most the longest stop string,
    less one character, is held back.

    Attributes:
        met: whether a stop string has come.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """See the class; with no strings, all text passes."""
        self._strings = tuple(strings)
        self._held = ""
        self.met = False

    def push(self, text: str) -> str:
        """Adds text; returns what is certain to come before a stop string."""
        text = self._held + text
        found = [(start + len(string), start) for string in self._strings if (start := text.find(string)) >= 0]
        self.met = bool(found)
        end = min(found)[1] if found else len(text) - self._possible(text)
        self._held = "" if found else text[end:]
        return text[:end]

    def finish(self) -> str:
        """The text that was held back; no text may follow."""
        return self._held

    def _possible(self, text: str) -> int:
        """The length of the longest end of a text with which a stop string begins."""
        longest = max(map(len, self._strings), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(string.startswith(text[-n:]) for string in self._strings)), 0)


class TextStream:
    """The text of a growing continuation, emitted as soon as it is certain.

    What is emitted is never taken back, and does not depend on how the tokens are divided into calls. The text of a
    continuation *is* what its stream emits: `whole` and `generate` give no other.

    Attributes:
        tokens: the tokens taken, up to the one that completed a stop string.
        stopped: whether a stop string has come. No more tokens are taken then.
    """

    def __init__(
        self,
        decode: Decode,
        prompt: Sequence[int],
        emit: Callable[[str], object] = lambda piece: None,
        stop: Sequence[str] = (),
    ) -> None:
        """A stream without any text.

        Args:
            decode: token ids -> text.
            prompt: the tokens before the continuation. They are not emitted, but tell whether it begins with a space.
            emit: called with each piece of text, never an empty one.
            stop: the text ends before the first of these strings; none may be empty.
        """
        self.tokens: list[int] = []
        self._decoder = IncrementalDecoder(decode, prompt)
        self._emit = emit
        self._stop = StopStrings(stop)
        self._pieces: list[str] = []

    @staticmethod
    def whole(decode: Decode, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """The text that `tokens` add to `prompt`."""
        stream = TextStream(decode, prompt)
        stream.extend(tokens)
        return stream.finish()

    @property
    def stopped(self) -> bool:
        """See the class."""
        return self._stop.met

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds tokens, and emits the text that has become certain."""
        piece = ""
        for token in tokens:
            if self.stopped:
                break
            self.tokens.append(token)
            piece += self._stop.push(self._decoder.push(token))
        self._send(piece)

    def finish(self) -> str:
        """Emits the text that was held back, and returns the whole text. No tokens may follow."""
        if not self.stopped:
            piece = self._stop.push(self._decoder.finish())
            self._send(piece if self.stopped else piece + self._stop.finish())
        return "".join(self._pieces)

    def _send(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            self._emit(piece)
