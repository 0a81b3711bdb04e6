"""The loop behind `generate`: a jitted prefill, then a jitted program that decodes a chunk of tokens per call.

Letters: B rows, T prompt tokens after padding. Prompts are padded on the left to a common length, so that
every row writes to the same cache slot (see `kv_cache.base`).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.generate.arguments import integer
from any4_jax.generate.chunk import Chunk
from any4_jax.generate.penalties import Counts, Penalties
from any4_jax.generate.prompts import TokenIds, checked_rows, end_ids
from any4_jax.generate.sampling import ALTERNATIVES, Sampler, Scores
from any4_jax.kv_cache import Cache, CacheFactory, DenseCache, traceable
from any4_jax.models.base import Decoder

# Prompts are padded to multiples of PROMPT_BUCKET and caches to multiples of CACHE_BUCKET, so that prompts of
# similar length share their programs.
PROMPT_BUCKET = 32
CACHE_BUCKET = 64
# The size of the loop's output buffer. Between chunks the host reads the tokens; 16 steps hide that cost.
CHUNK = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The static part of a model, on which a compiled step depends. Equal programs are one object.

    So jax compares them by identity. For 32 blocks a comparison takes 10 ms, as long as some steps, and jax would
    repeat it on every call. (`nnx.split` takes 50 ms, and hashing its result 6 ms.)
    """

    treedef: Any

    @classmethod
    def of(cls, model: Decoder) -> tuple["Program", list[jax.Array]]:
        """The program of a model, and its arrays."""
        leaves, treedef = jax.tree.flatten(model)
        return _program(treedef), leaves

    def model(self, leaves: list[jax.Array]) -> Decoder:
        """Rebuilds the model with these arrays."""
        return jax.tree.unflatten(self.treedef, leaves)


_program = functools.lru_cache(maxsize=64)(Program)


def generate_tokens(model: Decoder, prompts: Sequence[TokenIds], **settings: Any) -> Iterator[list[list[int]]]:
    """Yields the new tokens of every row as they are decoded: one list of at most `chunk` ids per row.

    After a row meets an end-of-text id, its lists are empty; the iterator ends when all rows have met one, or after
    `max_new_tokens`. So a row has stopped of itself if and only if it has fewer than `max_new_tokens` tokens. The first
    item holds one token per row, so its time is the time to the first token. The arguments are those of
    `generate_chunks`, which also tells log-probabilities and why a row ended; the checks run at the first `next`.
    """
    return (chunk.tokens for chunk in generate_chunks(model, prompts, **settings))


def generate_chunks(
    model: Decoder,
    prompts: Sequence[TokenIds],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    seed: int | None = None,
    eos: int | Sequence[int] | None = None,
    logprobs: int | None = None,
    cache: CacheFactory = DenseCache,
    chunk: int = CHUNK,
) -> Iterator[Chunk]:
    """Yields a `Chunk` of the new tokens of every row as they are decoded; see `generate_tokens`.

    The first chunk has one token per row, each other at most `chunk`, which is 1 to 16. The other arguments and the
    errors are those of `generate`; the checks run at the first `next`.
    """
    rows = checked_rows(model, prompts)
    max_new_tokens = integer("max_new_tokens", max_new_tokens, 0)
    chunk = integer("chunk", chunk, 1, CHUNK)
    if logprobs is not None:
        logprobs = integer("logprobs", logprobs, 0, ALTERNATIVES)
    longest, context = max(map(len, rows)), model.config.max_position_embeddings
    if longest + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context "
            f"of {context}; shorten the prompt or lower max_new_tokens"
        )
    penalties = Penalties.of(repetition_penalty, frequency_penalty, presence_penalty)
    scored = logprobs is not None
    sampler = Sampler.of(model.config.vocab_size, temperature, top_k, top_p, min_p, seed, penalties, scored)
    ends = end_ids(model, eos)
    if max_new_tokens == 0:
        return
    length = _round_up(longest, PROMPT_BUCKET)
    tokens = np.zeros((len(rows), length), np.int32)
    start = np.asarray([length - len(row) for row in rows], np.int32)
    for row, first, target in zip(rows, start, tokens, strict=True):
        target[first:] = row

    program, leaves = Program.of(model)
    slots = _round_up(length + max_new_tokens, CACHE_BUCKET)
    state, scores = _prefill(program, slots, traceable(cache), leaves, tokens, start, sampler, ends)
    ended = np.zeros(len(rows), bool)
    fresh, count = np.asarray(state.token)[:, None], 1
    scores = jax.tree.map(lambda score: np.asarray(score)[:, None], scores)
    while True:
        last = count == max_new_tokens
        yield Chunk.of(fresh, scores, logprobs, count - fresh.shape[1], ended, ends, last)
        if last or ended.all():
            return
        steps = min(chunk, max_new_tokens - count)
        sizes = np.int32(length), np.int32(count), np.int32(steps)
        state, out, scores = _decode(program, leaves, state, start, *sizes, sampler, ends)
        fresh, scores = jax.tree.map(lambda kept, steps=steps: np.asarray(kept)[:, :steps], (out, scores))
        count += steps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where the loop is.

    Attributes:
        token: int32 [B], the last token of each row, which is not in the caches yet.
        done: bool [B], the rows that have met an end-of-text id, or logits that are no numbers.
        caches: of the blocks.
        counts: what penalties need, or None.
    """

    token: jax.Array
    done: jax.Array
    caches: list[Cache]
    counts: Counts | None


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    program: Program,
    slots: int,
    factory: CacheFactory,
    leaves: list[jax.Array],
    tokens: jax.Array,
    start: jax.Array,
    sampler: Sampler,
    ends: jax.Array,
) -> tuple[State, Scores | None]:
    """int32 tokens [B, T] -> the state with the first new token and caches of `slots` slots, and its scores."""
    model = program.model(leaves)
    batch, length = tokens.shape
    positions = jnp.arange(length, dtype=jnp.int32)[None] - start[:, None]
    caches = model.init_cache(batch, slots, start=start, cache=factory)
    x, caches = model.decode(tokens, caches, positions)
    logits = model.head(x[:, -1:])[:, 0]
    token, counts, scores = sampler.draw(logits, sampler.counts(tokens, start, logits.shape[-1]), 0)
    return State(token, jnp.isin(token, ends), caches, counts), scores


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    program: Program,
    leaves: list[jax.Array],
    state: State,
    start: jax.Array,
    length: jax.Array,
    count: jax.Array,
    steps: jax.Array,
    sampler: Sampler,
    ends: jax.Array,
) -> tuple[State, jax.Array, Scores | None]:
    """Decodes at most `steps` more tokens; stops when all rows are done.

    There are `count` new tokens already, of which the last belongs in slot `length + count - 1`. Returns the state, the
    tokens int32 [B, CHUNK], and their scores, in which each array has an axis CHUNK after B.
    """
    model = program.model(leaves)

    def drawn(i: jax.Array, state: State) -> tuple[State, Scores | None]:
        positions = (length + count - 1 + i - start)[:, None]
        x, caches = model.decode(state.token[:, None], state.caches, positions)
        token, counts, scores = sampler.draw(model.head(x)[:, 0], state.counts, count + i)
        return State(token, state.done | jnp.isin(token, ends), caches, counts), scores

    def step(carry: Any) -> Any:
        i, state, kept = carry
        state, scores = drawn(i, state)
        new = state.token, scores
        kept = jax.tree.map(lambda k, n: jax.lax.dynamic_update_index_in_dim(k, n, i, axis=1), kept, new)
        return i + 1, state, kept

    def more(carry: Any) -> jax.Array:
        i, state, _ = carry
        return (i < steps) & ~state.done.all()

    batch, vocabulary = state.token.shape[0], model.config.vocab_size
    kept = jnp.zeros((batch, CHUNK), jnp.int32), Scores.empty(batch, CHUNK, vocabulary) if sampler.scored else None
    _, state, (out, scores) = jax.lax.while_loop(more, step, (jnp.int32(0), state, kept))
    return state, out, scores


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
