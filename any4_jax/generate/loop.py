"""The loop behind `generate`: a jitted prefill, then a jitted program that decodes a chunk of tokens per call.

Letters: B rows, T prompt tokens after padding. Prompts are padded on the left to a common length, so that
every row writes to the same cache slot (see `kv_cache.base`).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.choice import platform_of
from any4_jax.generate.arguments import integer
from any4_jax.generate.chunk import Chunk
from any4_jax.generate.penalties import Counts, Penalties
from any4_jax.generate.prompts import TokenIds, checked_rows, end_ids
from any4_jax.generate.sampling import ALTERNATIVES, Sampler, Scores
from any4_jax.kv_cache import Cache, CacheFactory, DenseCache, default_cache, traceable
from any4_jax.models.base import Decoder
from any4_jax.models.program import Program
from any4_jax.pytree import register_dataclass

# Prompts are padded to multiples of PROMPT_BUCKET and caches to multiples of CACHE_BUCKET, so that prompts of
# similar length share their programs.
PROMPT_BUCKET = 32
CACHE_BUCKET = 64
# The size of the loop's output buffer. Between chunks the host reads the tokens; 16 steps hide that cost.
CHUNK = 16
# Where this holds, the device never waits for the host. A chunk has a number of steps that the compiler knows, so no
# condition is read between steps, and the next chunk is under way before the tokens of the last are read. Steps whose
# tokens are dropped are the price: those after `max_new_tokens`, and a chunk after all rows have ended. A CPU would pay
# for them in full, and has no host to wait for.
RUNS_AHEAD = {"cpu": False, "cuda": True, "rocm": True, "tpu": True}


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
    cache: CacheFactory | None = None,
    chunk: int = CHUNK,
    prompt_length: int = 0,
) -> Iterator[Chunk]:
    """Yields a `Chunk` of the new tokens of every row as they are decoded; see `generate_tokens`.

    The first chunk has one token per row, each other at most `chunk`, which is 1 to 16; on GPUs and TPUs each size is a
    program of its own. Prompts are padded to `prompt_length` tokens at least, so that those of many lengths share a
    program. The other arguments and the errors are those of `generate`; the checks run at the first `next`.
    """
    rows = checked_rows(model, prompts)
    asked = Asked.of(
        model,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        seed=seed,
        eos=eos,
        logprobs=logprobs,
        chunk=chunk,
    )
    max_new_tokens, chunk, logprobs, sampler, ends = asked
    longest, context = max(map(len, rows)), model.config.max_position_embeddings
    if longest + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context "
            f"of {context}; shorten the prompt or lower max_new_tokens"
        )
    if max_new_tokens == 0:
        return
    length = _round_up(max(longest, prompt_length), PROMPT_BUCKET)
    tokens = np.zeros((len(rows), length), np.int32)
    start = np.asarray([length - len(row) for row in rows], np.int32)
    for row, first, target in zip(rows, start, tokens, strict=True):
        target[first:] = row

    cache = default_cache(model) if cache is None else cache
    cache = DenseCache if cache is None else cache
    program, leaves = Program.of(model)
    # The last token needs no slot, and surplus steps have theirs.
    slots = _round_up(length + _round_up(max_new_tokens - 1, chunk), CACHE_BUCKET)
    request = Request(start, np.int32(length), np.int32(max_new_tokens), np.int32(chunk), sampler, ends)
    state, *out = _prefill(program, slots, traceable(cache), leaves, tokens, request)
    # Outputs are committed to where the program runs, or else it runs where others do.
    ahead = RUNS_AHEAD.get(platform_of(state.token), False)
    more = functools.partial(_decode, program, chunk if ahead else None, leaves)
    count, steps, ended = 0, 1, np.zeros(len(rows), bool)
    while True:
        rest = max_new_tokens - count - steps
        # Not before the first token, which would wait for the loop to be compiled.
        early = ahead and count > 0 and rest > 0
        if early:
            state, *following = more(state)
        fresh, scores = jax.tree.map(lambda kept, steps=steps: np.asarray(kept)[:, :steps], out)
        yield Chunk.of(fresh, scores, logprobs, count, ended, ends, not rest)
        if not rest or ended.all():
            return
        if not early:
            state, *following = more(state)
        out, count, steps = following, count + steps, min(chunk, rest)


class Asked(NamedTuple):
    """The arguments of a generation, checked.

    Attributes:
        limit: the most new tokens.
        chunk, logprobs: as in `generate_chunks`.
        sampler: chooses the tokens.
        ends: int32 [n], the ids that end a row.
    """

    limit: int
    chunk: int
    logprobs: int | None
    sampler: Sampler
    ends: np.ndarray

    @classmethod
    def of(
        cls,
        model: Decoder,
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
        chunk: int = CHUNK,
    ) -> "Asked":
        """Those of `generate_chunks`.

        Raises:
            TypeError, ValueError: as in `generate`.
        """
        limit, chunk = integer("max_new_tokens", max_new_tokens, 0), integer("chunk", chunk, 1, CHUNK)
        if logprobs is not None:
            logprobs = integer("logprobs", logprobs, 0, ALTERNATIVES)
        penalties = Penalties.of(repetition_penalty, frequency_penalty, presence_penalty)
        limits = temperature, top_k, top_p, min_p, seed
        sampler = Sampler.of(model.config.vocab_size, *limits, penalties, logprobs is not None)
        return cls(limit, chunk, logprobs, sampler, end_ids(model, eos))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """What stays the same throughout a generation. The prefill takes numpy's arrays, and leaves them on the device, so
    that no later chunk needs anything from the host.

    Attributes:
        start: int32 [B], the first slot of each row that holds no padding.
        length: int32, the slots of the padded prompts.
        limit: int32, `max_new_tokens`.
        chunk: int32, the most steps of a call.
        sampler: chooses the tokens.
        ends: int32 [n], the ids that end a row.
    """

    start: Any
    length: Any
    limit: Any
    chunk: Any
    sampler: Sampler
    ends: Any


@register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where the loop is. Once `limit` tokens are drawn it must not be used again: surplus steps leave it meaningless.

    Attributes:
        token: int32 [B], the last token of each row, which is not in the caches yet.
        drawn: int32, the new tokens that each row has.
        done: bool [B], the rows that have met an end-of-text id, or logits that are no numbers; only kept up to date
            where the loop stops by it.
        caches: of the blocks.
        counts: what penalties need, or None.
        request: what was asked for.
    """

    token: jax.Array
    drawn: jax.Array
    done: jax.Array
    caches: list[Cache]
    counts: Counts | None
    request: Request


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    program: Program,
    slots: int,
    factory: CacheFactory,
    leaves: list[jax.Array],
    tokens: jax.Array,
    request: Request,
) -> tuple[State, jax.Array, Scores | None]:
    """int32 tokens [B, T] -> the state with the first new token and caches of `slots` slots; the token [B, 1], and its
    scores, in which each array has an axis 1 after B."""
    model = program.model(leaves)
    start, sampler = request.start, request.sampler
    batch, length = tokens.shape
    positions = jnp.arange(length, dtype=jnp.int32)[None] - start[:, None]
    caches = model.init_cache(batch, slots, start=start, cache=factory)
    x, caches = model.decode(tokens, caches, positions)
    logits = model.head(x[:, -1:])[:, 0]
    token, counts, scores = sampler.draw(logits, sampler.counts(tokens, start, logits.shape[-1]), 0)
    state = State(token, jnp.int32(1), jnp.isin(token, request.ends), caches, counts, request)
    return state, *jax.tree.map(lambda one: one[:, None], (token, scores))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _decode(
    program: Program, trips: int | None, leaves: list[jax.Array], state: State
) -> tuple[State, jax.Array, Scores | None]:
    """Decodes more tokens.

    Args:
        program, leaves: of the model.
        trips: the number of steps; those that go beyond `limit` give tokens without meaning. With None there are at
            most `chunk`, fewer if `limit` is reached or all rows are done.
        state: at least one token short of `limit`.

    Returns:
        The state, the tokens int32 [B, CHUNK], and their scores, in which each array has an axis CHUNK after B.
    """
    model, request, drawn = program.model(leaves), state.request, state.drawn
    steps = jnp.minimum(request.chunk, request.limit - drawn)

    def step(carry: Any) -> Any:
        i, state, kept = carry
        # The last token goes to slot length + drawn - 1. Surplus steps stay at the last position that was asked for,
        # since a model may have no other.
        slot = request.length + jnp.minimum(drawn + i, request.limit - 1) - 1
        x, caches = model.decode(state.token[:, None], state.caches, (slot - request.start)[:, None])
        token, counts, scores = request.sampler.draw(model.head(x)[:, 0], state.counts, drawn + i)
        done = state.done if trips is not None else state.done | jnp.isin(token, request.ends)
        state = dataclasses.replace(state, token=token, done=done, caches=caches, counts=counts)
        kept = jax.tree.map(lambda k, n: jax.lax.dynamic_update_index_in_dim(k, n, i, axis=1), kept, (token, scores))
        return i + 1, state, kept

    def more(carry: Any) -> jax.Array:
        i, state, _ = carry
        return (i < steps) & ~state.done.all()

    batch, vocabulary = state.token.shape[0], model.config.vocab_size
    scores = Scores.empty(batch, CHUNK, vocabulary) if request.sampler.scored else None
    first = jnp.int32(0), state, (jnp.zeros((batch, CHUNK), jnp.int32), scores)
    if trips is None:
        i, state, (out, scores) = jax.lax.while_loop(more, step, first)
    else:
        i, state, (out, scores) = jax.lax.fori_loop(0, trips, lambda _, carry: step(carry), first)
    return dataclasses.replace(state, drawn=drawn + i), out, scores


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
