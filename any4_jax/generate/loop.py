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

from any4_jax.generate.sampling import Sampler
from any4_jax.kv_cache import Cache, CacheFactory, DenseCache, traceable
from any4_jax.models.base import Decoder

# Prompts are padded to multiples of PROMPT_BUCKET and caches to multiples of CACHE_BUCKET, so that prompts of
# similar length share their programs.
PROMPT_BUCKET = 32
CACHE_BUCKET = 64
# The size of the loop's output buffer. Between chunks the host reads the tokens; 16 steps hide that cost.
CHUNK = 16
# End-of-text ids are padded to this many with -1, which no token equals, so that programs don't depend on their number.
EOS_SLOTS = 8

TokenIds = Sequence[int] | np.ndarray


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


def generate_tokens(
    model: Decoder,
    prompts: Sequence[TokenIds],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos: int | Sequence[int] | None = None,
    cache: CacheFactory = DenseCache,
    chunk: int = CHUNK,
) -> Iterator[list[list[int]]]:
    """Yields the new tokens of every row as they are decoded: one list of at most `chunk` ids per row.

    After a row meets an end-of-text id, its lists are empty; the iterator ends when all rows have met one, or after
    `max_new_tokens`. The first item holds one token per row, so its time is the time to the first token. The other
    arguments and the errors are those of `generate`; the checks run at the first `next`.
    """
    rows = [_checked_row(model, row) for row in prompts]
    if not rows:
        raise ValueError("the list of prompts is empty; pass at least one prompt")
    if max_new_tokens < 0 or not 1 <= chunk <= CHUNK:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens} and chunk {chunk}; at least 0 and 1 to {CHUNK} are needed"
        )
    longest, context = max(map(len, rows)), model.config.max_position_embeddings
    if longest + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context "
            f"of {context}; shorten the prompt or lower max_new_tokens"
        )
    sampler = Sampler.of(model.config.vocab_size, temperature, top_k, top_p, seed)
    ends = _eos_ids(model, eos)
    if max_new_tokens == 0:
        return
    length = _round_up(longest, PROMPT_BUCKET)
    tokens = np.zeros((len(rows), length), np.int32)
    start = np.asarray([length - len(row) for row in rows], np.int32)
    for row, first, target in zip(rows, start, tokens, strict=True):
        target[first:] = row

    program, leaves = Program.of(model)
    slots = _round_up(length + max_new_tokens, CACHE_BUCKET)
    token, done, caches = _prefill(program, slots, traceable(cache), leaves, tokens, start, sampler, ends)
    ended = np.zeros(len(rows), bool)
    fresh, count = np.asarray(token)[:, None], 1
    while True:
        yield _until_eos(fresh, ended, ends)
        if count == max_new_tokens or ended.all():
            return
        steps = min(chunk, max_new_tokens - count)
        token, done, caches, out = _decode(
            program,
            leaves,
            caches,
            token,
            done,
            start,
            np.int32(length),
            np.int32(count),
            np.int32(steps),
            sampler,
            ends,
        )
        fresh, count = np.asarray(out)[:, :steps], count + steps


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
) -> tuple[jax.Array, jax.Array, list[Cache]]:
    """int32 tokens [B, T] -> the first new token int32 [B], which rows are done bool [B], caches of `slots` slots."""
    model = program.model(leaves)
    batch, length = tokens.shape
    positions = jnp.arange(length, dtype=jnp.int32)[None] - start[:, None]
    caches = model.init_cache(batch, slots, start=start, cache=factory)
    x, caches = model.decode(tokens, caches, positions)
    token = sampler.sample(model.head(x[:, -1:])[:, 0], 0)
    return token, jnp.isin(token, ends), caches


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    program: Program,
    leaves: list[jax.Array],
    caches: list[Cache],
    token: jax.Array,
    done: jax.Array,
    start: jax.Array,
    length: jax.Array,
    count: jax.Array,
    steps: jax.Array,
    sampler: Sampler,
    ends: jax.Array,
) -> tuple[jax.Array, jax.Array, list[Cache], jax.Array]:
    """Decodes at most `steps` more tokens; stops when all rows are done.

    There are `count` new tokens already. The last of them, `token` int32 [B], is not in the caches yet and belongs in
    slot `length + count - 1`. Returns the last token, done, the caches, and the tokens int32 [B, CHUNK].
    """
    model = program.model(leaves)

    def step(carry: Any) -> Any:
        i, token, done, caches, out = carry
        positions = (length + count - 1 + i - start)[:, None]
        x, caches = model.decode(token[:, None], caches, positions)
        token = sampler.sample(model.head(x)[:, 0], count + i)
        out = jax.lax.dynamic_update_index_in_dim(out, token, i, axis=1)
        return i + 1, token, done | jnp.isin(token, ends), caches, out

    def more(carry: Any) -> jax.Array:
        i, _, done, _, _ = carry
        return (i < steps) & ~done.all()

    out = jnp.zeros((token.shape[0], CHUNK), jnp.int32)
    _, token, done, caches, out = jax.lax.while_loop(more, step, (jnp.int32(0), token, done, caches, out))
    return token, done, caches, out


def _checked_row(model: Decoder, row: TokenIds) -> np.ndarray:
    ids = np.asarray(row)
    if ids.ndim != 1 or ids.size == 0:
        raise ValueError(f"a prompt has shape {ids.shape}, and a non-empty list of token ids is needed; add a token")
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"a prompt holds {ids.dtype}, and integer token ids are needed; encode the text first")
    if ids.min() < 0 or ids.max() >= model.config.vocab_size:
        raise ValueError(
            f"token ids are in {ids.min()}..{ids.max()}, and the vocabulary is "
            f"0..{model.config.vocab_size - 1}; use the model's own tokenizer"
        )
    return ids


def _eos_ids(model: Decoder, eos: int | Sequence[int] | None) -> np.ndarray:
    """The ids that end a row: int32 [EOS_SLOTS or more], padded with -1."""
    if eos is None:
        own = set(model.config.eos_token_ids)
        ids = own | set(model.tokenizer.eos_ids) if model.tokenizer is not None else own
    else:
        ids = {eos} if isinstance(eos, int | np.integer) else set(eos)
    padded = np.full(max(EOS_SLOTS, len(ids)), -1, np.int32)
    padded[: len(ids)] = sorted(ids)
    return padded


def _until_eos(fresh: np.ndarray, ended: np.ndarray, ends: np.ndarray) -> list[list[int]]:
    """The rows of fresh [B, n], each up to its end-of-text id; marks in `ended` the rows that have met one."""
    rows = []
    for b, row in enumerate(fresh):
        stops = np.flatnonzero(np.isin(row, ends))
        kept = 0 if ended[b] else (stops[0] if stops.size else len(row))
        ended[b] |= stops.size > 0
        rows.append([int(token) for token in row[:kept]])
    return rows


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
