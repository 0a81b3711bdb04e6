"""What the harness needs of a tokenizer, for those of this library and those of transformers."""

from collections.abc import Mapping, Sequence
from typing import Any

from any4_jax.models import Tokenizer


class Coder:
    """Text to tokens and back, as lm-evaluation-harness's own backend for Hugging Face models does it.

    Attributes:
      prefix_id: the token before a text that has nothing before it: the BOS, or the first token that ends a text.
      name: tells tokenizers apart.
      template: the chat template, or None.
    """

    def __init__(self, tokenizer: Any) -> None:
        """See the class.

        Args:
          tokenizer: a `models.Tokenizer`, or a tokenizer of transformers.

        Raises:
          TypeError: there is no tokenizer.
          ValueError: it names neither a BOS nor an EOS.
        """
        if tokenizer is None:
            raise TypeError("the model has no tokenizer, and tasks are texts; pass tokenizer=...")
        self._tokenizer, self._ours = tokenizer, isinstance(tokenizer, Tokenizer)
        if self._ours:
            ends, bos = list(tokenizer.eos_ids), tokenizer.bos_id
        else:
            ends, bos = [i for i in [tokenizer.eos_token_id] if i is not None], tokenizer.bos_token_id
        if bos is None and not ends:
            raise ValueError(
                "the tokenizer names neither a BOS nor an EOS, and one of them is needed before texts without context; "
                "add one to tokenizer_config.json"
            )
        self.end_ids: list[int] = ends
        self.prefix_id: int = ends[0] if bos is None else bos
        self.name: str = repr(tokenizer) if self._ours else str(tokenizer.name_or_path)
        self.template: str | None = tokenizer.chat_template
        self._prefix_text = self.decode([self.prefix_id], special=True)

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """The tokens of a text.

        Args:
          text: may begin with the BOS, as chat templates write it; then no other is added.
          special: whether to add what the tokenizer's settings ask for, such as a BOS; None adds it unless it is there.
        """
        if special is None:
            special = not (self._prefix_text and text.startswith(self._prefix_text))
        if self._ours:
            return self._tokenizer.encode(text, add_bos=None if special else False)
        return list(self._tokenizer.encode(text, add_special_tokens=special))

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of tokens, with special ones or without."""
        if self._ours:
            return self._tokenizer.decode(ids, skip_special=not special)
        return self._tokenizer.decode(list(ids), skip_special_tokens=not special)

    def pair(self, before: str, after: str) -> tuple[list[int], list[int]]:
        """The tokens of a context and of its continuation, as they are in the text of both.

        Spaces at the end of the context belong to the continuation, as most tokenizers have them. An empty context is
        the prefix alone.
        """
        if not before:
            tokens = self.encode(after, special=False)
            return (tokens[:1], tokens[1:]) if tokens[:1] == [self.prefix_id] else ([self.prefix_id], tokens)
        stripped = before.rstrip()
        if stripped:
            before, after = stripped, before[len(stripped) :] + after
        first = self.encode(before)
        return first, self.encode(before + after)[len(first) :]

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The text of a chat, as the model's chat template writes it.

        Raises:
          ValueError: there is no template, or it refuses the messages.
        """
        if self._ours:
            return self._tokenizer.apply_chat(messages, add_generation_prompt=add_generation_prompt)
        if self.template is None:
            raise ValueError("the tokenizer has no chat template; leave the chat out, or add its template")
        return self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
