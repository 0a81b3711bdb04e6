"""A text that grows in turns: what it holds stays in the cache, so a turn computes its own tokens alone."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.generate.arguments import integer
from any4_jax.generate.chunk import Chunk
from any4_jax.generate.loop import Asked, Request, State, _decode
from any4_jax.generate.penalties import Counts
from any4_jax.generate.prompts import TokenIds, checked_rows
from any4_jax.generate.sampling import Scores
from any4_jax.kv_cache import Cache, CacheFactory, DenseCache, default_cache, traceable
from any4_jax.models.base import Decoder
from any4_jax.models.program import Program

PIECES = (512, 64, 8, 1)
"""New tokens are read in pieces of these sizes, the largest that fits first. There can be no padding between tokens of
one text, and each size is a program of its own."""
LEAST_SLOTS = 256
MOST_SLOTS = 32768
"""The context of a session whose size nobody gave."""


class Session:
    """A text of a model that grows in turns: first the caller's tokens of a turn, then those that the model adds.

        session = Session(model)
        for chunk in session.extend(ids, max_new_tokens=32): ...
        for chunk in session.extend(more, max_new_tokens=32): ...

    Attributes:
        model: of the text.
        slots: how many tokens it may have.
        tokens: those that it has. An end-of-text id that ended a turn is none of them. All that the model wrote is, up
            to the token at which the caller stopped to ask for more.
    """

    def __init__(self, model: Decoder, *, slots: int | None = None, cache: CacheFactory | None = None) -> None:
        """An empty text.

        Args:
            model: whose arrays may change between turns, and then serve for what is new.
            slots: how many tokens the text may have. None means the model's context, but at most 32768. A `DenseCache`
                takes memory as the text grows, others for so many from the beginning.
            cache: creates the caches; None takes the model's own, as in `generate`.

        Raises:
            TypeError: `slots` is no integer, or `cache` is neither a pytree nor hashable.
            ValueError: `slots` is below 1 or exceeds the model's context.
        """
        context = model.config.max_position_embeddings
        advice = ", as the model's context has no more"
        self.model = model
        self.slots = min(context, MOST_SLOTS) if slots is None else integer("slots", slots, 1, context, advice)
        self.tokens: list[int] = []
        cache = default_cache(model) if cache is None else cache
        self._factory = traceable(DenseCache if cache is None else cache)
        # None before the first token, and while a program has them: after an interrupt the text is read anew.
        self._caches: list[Cache] | None = None
        self._cached = self._held = self._turn = 0

    def reset(self) -> None:
        """Forgets the text."""
        self.tokens, self._caches = [], None
        self._turn += 1

    def extend(self, ids: TokenIds, *, max_new_tokens: int, **settings: Any) -> Iterator[Chunk]:
        """Adds tokens to the text, and yields what the model adds, as `generate_chunks` does for one prompt.

        Turns give what a prompt of the whole text so far gives, up to rounding, with any cache that shows each token
        the others as they are stored (`kv_cache.as_decoded`). For penalties all that was in the text before is prompt.
        A turn may be left at any chunk: the text then ends with it.

        Args:
            ids: the tokens to add, at least one.
            max_new_tokens: the most that the model adds; with 0 it only reads.
            settings: further arguments of `generate_chunks`, but for the cache. The checks run at the first `next`.

        Raises:
            ValueError: text, `ids` and `max_new_tokens` together exceed `slots`; and as in `generate`.
            TypeError: as in `generate`.
        """
        (row,) = checked_rows(self.model, [ids])
        limit, chunk, logprobs, sampler, ends = Asked.of(self.model, max_new_tokens=max_new_tokens, **settings)
        needed = len(self.tokens) + len(row) + limit
        if needed > self.slots:
            raise ValueError(
                f"a text of {len(self.tokens)} tokens, {len(row)} more and {limit} new ones exceed the {self.slots} "
                "that the session holds; lower max_new_tokens, shorten what is added, or reset the session"
            )
        self._turn += 1
        turn, program, leaves = self._turn, *Program.of(self.model)
        self.tokens += row.tolist()
        x = self._read(program, leaves, needed)
        if limit == 0:
            return
        length = len(self.tokens)
        request = Request(np.zeros(1, np.int32), np.int32(length), np.int32(limit), np.int32(chunk), sampler, ends)
        caches, self._caches = self._caches, None
        assert caches is not None
        # On the left of a fixed size, as a prompt is: no program depends on the length.
        start, whole = np.asarray([self._held - length], np.int32), np.zeros((1, self._held), np.int32)
        whole[0, start[0] :] = self.tokens
        counts = sampler.counts(whole, start, self.model.config.vocab_size)  # type: ignore[arg-type]
        request, token, done, counts, *out = _first(program, leaves, x, request, counts)
        state, count, steps = State(token, jnp.int32(1), done, caches, counts, request), 0, 1
        ended = np.zeros(1, bool)
        while True:
            rest = limit - count - steps
            fresh, scores = jax.tree.map(lambda kept, steps=steps: np.asarray(kept)[:, :steps], out)
            found = Chunk.of(fresh, scores, logprobs, count, ended, ends, not rest)
            self.tokens += found.tokens[0]
            # The last token that was drawn isn't in the caches yet; if it ends the text, it is none of its tokens.
            self._caches, self._cached = state.caches, len(self.tokens) - (not ended[0])
            yield found
            if not rest or ended[0] or self._turn != turn:
                return
            self._caches = None
            # No step beyond the last that counts, on any platform: what a cache holds can't be taken out of it.
            state, *out = _decode(program, None, leaves, state)
            count, steps = count + steps, min(chunk, rest)

    def _read(self, program: Program, leaves: list[Any], needed: int) -> jax.Array:
        """Reads the tokens that aren't in the caches yet, into caches for `needed` tokens; returns the last block's
        output for the last token, [1, 1, E]."""
        caches, self._caches = self._caches, None
        if caches is None:
            self._cached, self._held = 0, self._enough(needed)
            planned = jax.eval_shape(functools.partial(_empty, program, self._held, self._factory), leaves)
            if not all(hasattr(cache, "with_slots") for cache in planned):
                self._held = self.slots
            caches = _empty(program, self._held, self._factory, leaves)
        elif needed > self._held:
            self._held = self._enough(needed)
            caches = _grown(self._held, caches)
        x = None
        while self._cached < len(self.tokens):
            size = next(piece for piece in PIECES if piece <= len(self.tokens) - self._cached)
            piece = np.asarray(self.tokens[self._cached : self._cached + size], np.int32)
            x, caches = _append(program, leaves, piece, np.int32(self._cached), caches)
            self._cached += size
        self._caches = caches
        assert x is not None  # a turn adds tokens
        return x

    def _enough(self, needed: int) -> int:
        """A number of slots that few turns change, since each has programs of its own."""
        return min(self.slots, max(LEAST_SLOTS, 1 << (needed - 1).bit_length()))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty(program: Program, slots: int, factory: CacheFactory, leaves: list[Any]) -> list[Cache]:
    """Caches for one row of `slots` tokens, each array of its own."""
    return program.model(leaves).init_cache(1, slots, cache=factory)


@functools.partial(jax.jit, static_argnums=0)
def _grown(slots: int, caches: list[Any]) -> list[Cache]:
    """The caches with more slots."""
    return [cache.with_slots(slots) for cache in caches]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _append(
    program: Program, leaves: list[Any], tokens: jax.Array, before: jax.Array, caches: list[Cache]
) -> tuple[jax.Array, list[Cache]]:
    """int32 tokens [T] after `before` others -> the last block's output for the last of them [1, 1, E], and caches that
    hold them."""
    positions = before + jnp.arange(len(tokens), dtype=jnp.int32)[None]
    x, caches = program.model(leaves).decode(tokens[None], caches, positions)
    return x[:, -1:], caches


@functools.partial(jax.jit, static_argnums=0)
def _first(
    program: Program, leaves: list[Any], x: jax.Array, request: Request, counts: Counts | None
) -> tuple[Request, jax.Array, jax.Array, Counts | None, jax.Array, Scores | None]:
    """The first new token from what `_append` returned: the request on the device, the token [1], whether it ends the
    text, the counts with it; and the token [1, 1] and its scores with an axis more."""
    logits = program.model(leaves).head(x)[:, 0]
    token, counts, scores = request.sampler.draw(logits, counts, 0)
    shown = jax.tree.map(lambda one: one[:, None], (token, scores))
    return request, token, jnp.isin(token, request.ends), counts, *shown
