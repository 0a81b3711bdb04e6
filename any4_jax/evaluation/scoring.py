"""The log-likelihood of continuations: how probable a model finds some tokens after others.

Rows are padded to few lengths and batched to few sizes, so that a second evaluation compiles nothing. Padding follows
the tokens, and a causal model doesn't see what follows.

Letters: B rows, T tokens after padding, C continuations that share a row's input, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.evaluation.windows import Progress

BATCH_TOKENS = 2048
_SHORTEST = 32
# Continuations that share an input, such as the letters of a question's answers, are scored in one row, padded to a
# number of these.
_SHARED = 4


class Scored(NamedTuple):
    """The log-probability of a continuation in nats, and whether each of its tokens is the likeliest one."""

    log_likelihood: float
    greedy: bool


class _Row(NamedTuple):
    """An input, and the continuations that are scored after it: the number of each request, and its tokens."""

    tokens: tuple[int, ...]
    continuations: list[tuple[int, tuple[int, ...]]]


def bucket(length: int, longest: int) -> int:
    """The length that a row of `length` tokens is padded to: 32, 48, 64, 96, 128, ..., at most `longest`."""
    padded = _SHORTEST
    while padded < length:
        # By a half, then by a third: twice as much in two steps.
        padded += padded // 2 if padded & (padded - 1) == 0 else padded // 3
    return min(padded, longest)


def log_likelihoods(
    logits: Callable[[jax.Array], jax.Array],
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    context: int,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> list[Scored]:
    """Scores continuations after contexts, in the order of the requests.

    The softmax is computed in float32, and a row's terms are added in it.

    Args:
      logits: the model: int32 tokens [B, T] to logits [B, T, V].
      requests: (context, continuation) as token ids; of contexts that are too long, the end counts.
      context: the most tokens that the model takes.
      batch_tokens: rows are batched up to this many tokens.
      progress: called with (rows done, rows in total).

    Raises:
      ValueError: a context is empty, or a continuation is empty or longer than the model's context.
    """
    rows = _rows(requests, context)
    results: list[Scored | None] = [None] * len(requests)
    done = 0
    for length, shared, batch in _batches(rows, context, batch_tokens):
        size = _batch_size(len(batch), length, batch_tokens)
        tokens = np.zeros((size, length), np.int32)
        targets = np.zeros((size, length, shared), np.int32)
        counted = np.zeros((size, length, shared), bool)
        for i, row in enumerate(batch):
            tokens[i, : len(row.tokens)] = row.tokens
            for j, (_, continuation) in enumerate(row.continuations):
                span = slice(len(row.tokens) - len(continuation), len(row.tokens))
                targets[i, span, j], counted[i, span, j] = continuation, True
        sums, greedy = (np.asarray(each) for each in _scores(logits(jnp.asarray(tokens)), targets, counted))
        for i, row in enumerate(batch):
            for j, (number, _) in enumerate(row.continuations):
                results[number] = Scored(float(sums[i, j]), bool(greedy[i, j]))
        done += len(batch)
        if progress is not None:
            progress(done, len(rows))
    return [result for result in results if result is not None]


def rolling(tokens: Sequence[int], prefix: int, context: int) -> list[tuple[list[int], list[int]]]:
    """Requests for `log_likelihoods` whose sum is the log-likelihood of a whole text, each token predicted once.

    The first window begins with `prefix`; the last one reaches back over tokens that were predicted already, so that
    it is as long as the others.

    Args:
      tokens: of the text.
      prefix: the token that stands before it.
      context: tokens in a window.
    """
    requests, stream = [], [prefix, *tokens]
    for first in range(0, len(tokens), context):
        end = min(first + context, len(tokens))
        begin = max(0, end - context)
        requests.append((stream[begin : first + 1], stream[first + 1 : end + 1]))
    return requests


def _rows(requests: Iterable[tuple[Sequence[int], Sequence[int]]], context: int) -> list[_Row]:
    found: dict[tuple[int, ...], _Row] = {}
    for number, (before, after) in enumerate(requests):
        if not before or not 0 < len(after) <= context:
            raise ValueError(
                f"request {number} has a context of {len(before)} tokens and a continuation of {len(after)}, and both "
                f"need one token or more, and the continuation {context} at most; shorten it"
            )
        # The last token is predicted, and so is no input.
        tokens = tuple([*before, *after][-(context + 1) : -1])
        found.setdefault(tokens, _Row(tokens, [])).continuations.append((number, tuple(after)))
    return list(found.values())


def _batches(rows: Iterable[_Row], context: int, batch_tokens: int) -> Iterable[tuple[int, int, list[_Row]]]:
    """Batches of rows that are padded alike, the longest first: the length, the continuations of a row, the rows."""
    groups: dict[tuple[int, int], list[_Row]] = {}
    for row in rows:
        shared = 1
        while shared < len(row.continuations):
            shared *= _SHARED
        groups.setdefault((bucket(len(row.tokens), context), shared), []).append(row)
    for (length, shared), group in sorted(groups.items(), reverse=True):
        size = max(1, batch_tokens // length)
        for first in range(0, len(group), size):
            yield length, shared, group[first : first + size]


def _batch_size(rows: int, length: int, batch_tokens: int) -> int:
    """The rows that a batch is padded to: a full batch, or a power of two for the rest."""
    return min(max(1, batch_tokens // length), 1 << (rows - 1).bit_length())


@jax.jit
def _scores(logits: jax.Array, targets: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of log p(target), and whether all are the likeliest: [B, T, V], [B, T, C], [B, T, C] -> two of [B, C]."""
    logits = logits.astype(jnp.float32)
    log_p = jnp.take_along_axis(logits, targets, axis=-1) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    likeliest = jnp.argmax(logits, axis=-1)[..., None] == targets
    return jnp.where(counted, log_p, 0.0).sum(axis=1), (likeliest | ~counted).all(axis=1)
