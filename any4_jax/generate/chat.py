"""A conversation with a model: each turn reads the new message alone, for all before it is in the cache."""

from collections.abc import Callable, Sequence
from typing import Any

from any4_jax.generate.session import Session
from any4_jax.generate.streaming import TextStream
from any4_jax.generate.text import STREAM_CHUNK, stop_strings
from any4_jax.kv_cache import CacheFactory
from any4_jax.models.base import Decoder

_MARK = "the answer"


class Chat:
    """A conversation through the chat template of a model.

        chat = Chat(model, system="Answer in one sentence.")
        print(chat.answer("What is a cache?"))
        print(chat.answer("And who invented it?"))

    What the model said stays in the cache as it said it, a stop string too, also where the template would write an
    earlier answer otherwise (without its thoughts, say). The template writes what comes between two answers. If it
    doesn't write an earlier answer in one place, the whole conversation is read anew in each turn.

    Attributes:
        session: the text of the conversation, see `Session`.
        messages: the conversation so far, a list of {"role": str, "content": str}.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        system: str | None = None,
        slots: int | None = None,
        cache: CacheFactory | None = None,
    ) -> None:
        """A conversation in which nothing was said.

        Args:
            model: it needs a tokenizer with a chat template.
            system: a message that comes first.
            slots, cache: as for `Session`.

        Raises:
            ValueError: the model has no chat template; and as in `Session`.
            TypeError: as in `Session`.
        """
        if getattr(model.tokenizer, "chat_template", None) is None:
            raise ValueError("the model's tokenizer has no chat template, and a chat needs one; use generate instead")
        self.session = Session(model, slots=slots, cache=cache)
        self._before = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._before)
        self._tokens = 0  # of the session, after the last answer

    def reset(self) -> None:
        """Forgets what was said, but for the system message."""
        self.session.reset()
        self.messages = list(self._before)

    def answer(
        self,
        text: str,
        *,
        max_new_tokens: int = 512,
        stop: str | Sequence[str] = (),
        stream: Callable[[str], object] | None = None,
        **settings: Any,
    ) -> str:
        """The model's answer to a message.

        Args:
            text: the message.
            max_new_tokens: the most tokens of the answer.
            stop: texts before the first of which the answer ends.
            stream: called with each piece of the answer as it comes.
            settings: of the sampling, as in `generate`.

        Raises:
            ValueError: the template refuses the message, the conversation would exceed the session's slots; and as in
                `generate`.
            TypeError: as in `generate`.
        """
        stops = stop_strings(stop)
        ids = self.new_tokens(text)
        said = TextStream(self.session.model.tokenizer.decode, ids, stream or (lambda piece: None), stops)
        # What follows a stop string would stay in the cache.
        for chunk in self.session.extend(
            ids, max_new_tokens=max_new_tokens, chunk=1 if stops else STREAM_CHUNK, **settings
        ):
            said.extend(chunk.tokens[0])
            if said.stopped:
                break
        answer = said.finish()
        self.said(text, answer)
        return answer

    def new_tokens(self, text: str) -> list[int]:
        """The tokens that a message adds to the session's, up to those that begin the answer.

        Raises:
            ValueError: the template refuses the message.
        """
        tokenizer, messages = self.session.model.tokenizer, [*self.messages, {"role": "user", "content": text}]
        answered = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        # Else a turn was interrupted.
        if answered and len(self.session.tokens) == self._tokens:
            mark = _MARK
            while any(mark in message["content"] for message in messages):
                mark += "'"
            marked = {**messages[answered[-1]], "content": mark}
            whole = tokenizer.apply_chat([*messages[: answered[-1]], marked, *messages[answered[-1] + 1 :]])
            if whole.count(mark) == 1:
                return list(tokenizer.encode(whole.partition(mark)[2], add_bos=False))
        ids = list(tokenizer.encode_chat(messages))
        self.session.reset()
        return ids

    def said(self, text: str, answer: str) -> None:
        """Notes a message and its answer, whose tokens the session has."""
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        self._tokens = len(self.session.tokens)
