"""Models of this library for lm-evaluation-harness, without torch."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.evaluation.cached import reading
from any4_jax.evaluation.coders import Coder
from any4_jax.evaluation.scoring import BATCH_TOKENS, bucket, log_likelihoods, rolling
from any4_jax.evaluation.windows import Progress
from any4_jax.generate import TextStream, generate_tokens
from any4_jax.kv_cache import CacheFactory, DenseCache
from any4_jax.models import Decoder
from any4_jax.models.hf_flax import is_hf_flax

NEW_TOKENS = 256
"""The most tokens of an answer, where a task doesn't say."""
# What tasks may say of generation, and `generate` calls otherwise or has by default.
_KNOWN = {"until", "do_sample", "temperature", "top_p", "top_k", "max_gen_toks", "max_new_tokens", "max_tokens"}


class Judged:
    """A model as lm-evaluation-harness asks it: scores of continuations and of texts, and answers.

    `harness_model` makes it the harness's own kind of model, `lm_eval.api.model.LM`.

    Attributes:
      coder: its tokenizer.
      context: the most tokens that it takes.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        context: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        cache: CacheFactory | None = None,
        progress: Progress | None = None,
    ) -> None:
        """See `harness_model`."""
        self._model, self._cache, self._batch_tokens, self._progress = model, cache, batch_tokens, progress
        self.coder = Coder(getattr(model, "tokenizer", None) if tokenizer is None else tokenizer)
        own = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if context is None and own is None:
            raise ValueError(f"the context of a {type(model).__name__} is unknown; pass context=... in tokens")
        self.context: int = min(size for size in (context, own) if size is not None)
        if is_hf_flax(model):
            run = jax.jit(lambda params, tokens: model(tokens, params=params).logits)
            self._logits: Callable[[jax.Array], jax.Array] = lambda tokens: run(model.params, tokens)
        else:
            self._logits = reading(model, cache)

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation after its context in nats, and whether it is the likeliest one."""
        requests = [self.coder.pair(*pair) for pair in pairs]
        return [tuple(each) for each in self._scored(requests)]

    def score_texts(self, texts: Sequence[str]) -> list[float]:
        """The log-likelihood of each whole text in nats."""
        prefix = self.coder.prefix_id
        windows = [rolling(self.coder.encode(text), prefix, self.context) for text in texts]
        scored = iter(self._scored([window for each in windows for window in each]))
        return [sum(next(scored).log_likelihood for _ in each) for each in windows]

    def answer(self, prompts: Sequence[str], settings: Sequence[dict[str, Any]]) -> list[str]:
        """The answer to each prompt, up to the first of the texts that end it.

        Args:
          prompts: if one is too long, its end counts.
          settings: as tasks give them: "until" (a text or several), "max_gen_toks", and "temperature", "top_k", "top_p"
            where "do_sample" is true.

        Raises:
          ValueError: a setting is unknown, or there is no room for the answer.
        """
        groups: dict[Any, list[int]] = {}
        for number, each in enumerate(settings):
            groups.setdefault(_asked(each), []).append(number)
        results, done = [""] * len(prompts), 0
        for asked, numbers in groups.items():
            until, new, sampling = asked
            room = self.context - new
            if room < 1:
                raise ValueError(
                    f"a task asks for {new} new tokens, and the model's context has {self.context} in all; limit them "
                    "with max_gen_toks"
                )
            tokens = {number: self.coder.encode(prompts[number])[-room:] for number in numbers}
            for batch, length in _alike(tokens, room, self._batch_tokens):
                rows = [tokens[number] for number in batch]
                # Each batch draws anew.
                drawn = dict(sampling) | ({"seed": batch[0]} if sampling else {})
                for number, text in zip(batch, self._answers(rows, length, until, new, drawn), strict=True):
                    results[number] = text
                done += len(batch)
                if self._progress is not None:
                    self._progress(done, len(prompts))
        return results

    def _scored(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Any]:
        return log_likelihoods(
            self._logits,
            requests,
            context=self.context,
            batch_tokens=self._batch_tokens,
            progress=self._progress,
        )

    def _answers(
        self, rows: list[list[int]], length: int, until: Sequence[str], new: int, sampling: dict[str, Any]
    ) -> list[str]:
        """Answers to prompts that are padded to one length; the batch is padded to a power of two by its last row."""
        padded = rows + rows[-1:] * ((1 << (len(rows) - 1).bit_length()) - len(rows))
        # Decoded without the prompt, as the harness's own backend does: some tokenizers then drop a space at the begin.
        streams = [TextStream(self.coder.decode, [], stop=until) for _ in rows]
        for chunk in self._generated(padded, length, new, sampling):
            for stream, tokens in zip(streams, chunk, strict=False):
                stream.extend(tokens)
            if all(stream.stopped for stream in streams):
                break
        return [stream.finish() for stream in streams]

    def _generated(
        self, rows: list[list[int]], length: int, new: int, sampling: dict[str, Any]
    ) -> Iterator[list[list[int]]]:
        if isinstance(self._model, Decoder):
            cache = DenseCache if self._cache is None else self._cache
            ends = self.coder.end_ids or None
            return generate_tokens(
                self._model, rows, max_new_tokens=new, eos=ends, cache=cache, prompt_length=length, **sampling
            )
        if not is_hf_flax(self._model):
            raise ValueError(
                f"a task asks for generated text, and a {type(self._model).__name__} can't generate; pass a model of "
                "this library or a Flax model of transformers"
            )
        return iter([self._hf_generated(rows, length, new, sampling)])

    def _hf_generated(self, rows: list[list[int]], length: int, new: int, sampling: dict[str, Any]) -> list[list[int]]:
        tokens, mask = np.zeros((2, len(rows), length), np.int32)
        for i, row in enumerate(rows):
            tokens[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
        ends = self.coder.end_ids
        made = self._model.generate(
            jnp.asarray(tokens),
            attention_mask=jnp.asarray(mask),
            max_new_tokens=new,
            do_sample=bool(sampling),
            pad_token_id=ends[0] if ends else 0,
            eos_token_id=ends[0] if ends else None,
            prng_key=jax.random.key_data(jax.random.key(sampling.pop("seed", 0))),
            **sampling,
        )
        found = np.asarray(made.sequences)[:, length:].tolist()
        return [row[: min((row.index(end) for end in ends if end in row), default=len(row))] for row in found]


def harness_model(model: Any, tokenizer: Any = None, **settings: Any) -> Any:
    """A model as lm-evaluation-harness takes it: `lm_eval.simple_evaluate(model=harness_model(model), tasks=[...])`.

    Lengths and batches are padded to few sizes, so that a second evaluation compiles nothing. Texts are tokenized as by
    the harness's own backend "hf" with its default settings.

    Args:
      model: a Decoder; a Flax model of transformers; or any function of tokens [B, T] to logits [B, T, V], which can't
        generate.
      tokenizer: of this library or of transformers; None takes the model's own.
      context: the most tokens of an input; None takes the model's.
      batch_tokens: inputs are batched up to this many tokens.
      cache: see `perplexity`.
      progress: called with (inputs done, inputs in total), which begin anew with each kind of question.

    Raises:
      ImportError: lm_eval is not installed.
      TypeError, ValueError: there is no tokenizer, or the context is unknown.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ImportError(
            f"the harness needs the package lm_eval, which isn't installed ({error}); run pip install 'any4_jax[eval]'"
        ) from error
    return _adapter(LM)(Judged(model, tokenizer, **settings))


@functools.cache
def _adapter(base: type) -> type:
    class HarnessModel(base):  # type: ignore[misc,valid-type]
        """A `Judged` model behind the interface of lm-evaluation-harness."""

        def __init__(self, judged: Judged) -> None:
            super().__init__()
            self.judged = judged

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return self._kept("loglikelihood", requests, self.judged.score([each.args for each in requests]))

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            found = self.judged.score_texts([each.args[0] for each in requests])
            return self._kept("loglikelihood_rolling", requests, found)

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            prompts, settings = zip(*(each.args for each in requests), strict=True) if requests else ((), ())
            return self._kept("generate_until", requests, self.judged.answer(prompts, settings))

        def _kept(self, kind: str, requests: Sequence[Any], results: list[Any]) -> list[Any]:
            for request, result in zip(requests, results, strict=True):
                self.cache_hook.add_partial(kind, request.args, result)
            return results

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return self.judged.coder.chat(chat_history, add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return self.judged.coder.template if chat_template else None

        @property
        def tokenizer_name(self) -> str:
            return self.judged.coder.name.replace("/", "__")

    return HarnessModel


def _asked(settings: dict[str, Any]) -> tuple[tuple[str, ...], int, tuple[tuple[str, Any], ...]]:
    """What a task asks of generation: the texts that end an answer, its most tokens, and how tokens are sampled."""
    unknown = sorted(set(settings) - _KNOWN)
    if unknown:
        raise ValueError(
            f"a task sets {unknown[0]} of generation, and {', '.join(sorted(_KNOWN))} are known; leave it out"
        )
    until = settings.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    new = next((settings[name] for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in settings), None)
    temperature = settings.get("temperature")
    temperature = float(bool(settings.get("do_sample")) if temperature is None else temperature)
    # As in the harness's own backend, a temperature of 0 is no sampling, whatever do_sample says.
    sampled = temperature > 0 and settings.get("do_sample", True)
    given = {"temperature": temperature} | {name: settings.get(name) for name in ("top_k", "top_p")}
    sampling = tuple((name, value) for name, value in given.items() if sampled and value is not None)
    return tuple(text for text in until if text), NEW_TOKENS if new is None else int(new), sampling


def _alike(tokens: dict[int, list[int]], room: int, batch_tokens: int) -> Iterator[tuple[list[int], int]]:
    """Batches of prompts that are padded to one length: their numbers, and the length."""
    groups: dict[int, list[int]] = {}
    for number, row in tokens.items():
        groups.setdefault(bucket(len(row), room), []).append(number)
    for length, numbers in sorted(groups.items(), reverse=True):
        size = max(1, batch_tokens // length)
        for first in range(0, len(numbers), size):
            yield numbers[first : first + size], length
