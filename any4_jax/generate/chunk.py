"""What a generation gives: chunks of tokens while it runs, continuations at its end."""

import dataclasses
from typing import Literal

import numpy as np

from any4_jax.generate.sampling import INVALID, Scores

FinishReason = Literal["stop", "length"]
"""Why a row ended: an end-of-text id or a stop string came, or `max_new_tokens` did."""


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A continuation with what is known of it.

    Attributes:
        text: without the stop string and what comes after it; None if the prompt was token ids.
        tokens: the new tokens, without the end-of-text id; with a stop string, up to the one that completed it.
        logprobs: of each token, its natural log-probability under the model's own distribution, which is
            log_softmax(logits) before penalties, temperature and limits.
        alternatives: for each token, the likeliest tokens in its place and their log-probabilities, likeliest first;
            as many as were asked for.
        finish_reason: "stop" if it ended at an end-of-text id or a stop string, "length" at `max_new_tokens`.
    """

    text: str | None
    tokens: list[int]
    logprobs: list[float]
    alternatives: list[dict[int, float]]
    finish_reason: FinishReason


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The tokens that a few steps gave; each list has an entry per row.

    Attributes:
        tokens: the new tokens of the row, up to its end-of-text id.
        logprobs: of each token (see `Continuation`); empty lists unless asked for.
        alternatives: of each token (see `Continuation`); empty lists unless asked for.
        finish_reasons: None for a row that goes on.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    alternatives: list[list[dict[int, float]]]
    finish_reasons: list[FinishReason | None]

    @classmethod
    def of(
        cls,
        fresh: np.ndarray,
        scores: Scores | None,
        wanted: int | None,
        before: int,
        ended: np.ndarray,
        ends: np.ndarray,
        last: bool,
    ) -> "Chunk":
        """A chunk from what the loop returned.

        Args:
            fresh: int32 [B, n], tokens.
            scores: with numpy arrays [B, n, ...], or None.
            wanted: the number of alternatives.
            before: the number of tokens that each row had before.
            ended: bool [B], the rows that had met an end-of-text id; those that do now are marked.
            ends: the end-of-text ids.
            last: whether `max_new_tokens` is reached.

        Raises:
            ValueError: the logits of a row that had not ended were no numbers.
        """
        chunk = cls([], [], [], [])
        for b, row in enumerate(fresh):
            stops = np.flatnonzero(np.isin(row, ends))
            kept = 0 if ended[b] else int(stops[0]) if stops.size else len(row)
            if not ended[b] and kept < len(row) and row[kept] == INVALID:
                raise ValueError(
                    f"the logits of new token {before + kept + 1} of row {b} are NaN or infinite, so no token can be "
                    "chosen; look for NaN in the weights, or, if float16 or bfloat16 overflows, load the model with "
                    "dtype float32"
                )
            ended[b] |= stops.size > 0
            chunk.tokens.append([int(token) for token in row[:kept]])
            chunk.logprobs.append([])
            chunk.alternatives.append([])
            if scores is not None:
                chunk.logprobs[b] += [float(chosen) for chosen in scores.chosen[b, :kept]]
                pairs = zip(scores.tokens[b, :kept, :wanted], scores.logprobs[b, :kept, :wanted], strict=True)
                chunk.alternatives[b] += [
                    {int(token): float(score) for token, score in zip(*pair, strict=True)} for pair in pairs
                ]
            chunk.finish_reasons.append("stop" if ended[b] else "length" if last else None)
        return chunk
