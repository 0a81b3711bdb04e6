"""Chooses the next token from logits: greedy, or sampled with temperature, top-k, top-p and min-p; with penalties."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.generate.arguments import integer, real
from any4_jax.generate.penalties import Counts, Penalties
from any4_jax.pytree import register_dataclass

# The "token" of a row whose logits are no numbers.
INVALID = -1
# Below this, sampling only differs from greedy where two logits are equal to the last bits. vLLM's bound too.
LEAST_TEMPERATURE = 1e-5
# The most alternatives that `logprobs` may ask for. All are computed, so that their number is no part of the program.
ALTERNATIVES = 20


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """What the model itself thought of each row's next token, before penalties and temperature.

    Attributes:
        chosen: float32 [B], the log-probability of the chosen token.
        tokens: int32 [B, n], the likeliest tokens, likeliest first; n is ALTERNATIVES or the vocabulary's size.
        logprobs: float32 [B, n], their log-probabilities.
    """

    chosen: jax.Array
    tokens: jax.Array
    logprobs: jax.Array

    @classmethod
    def empty(cls, batch: int, steps: int, vocabulary: int) -> "Scores":
        """Zeros for the scores of several steps, on an axis after B."""
        shape = (batch, steps, min(ALTERNATIVES, vocabulary))
        return cls(jnp.zeros(shape[:2], jnp.float32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))

    @classmethod
    def of(cls, logits: jax.Array, token: jax.Array) -> "Scores":
        """The scores of logits [B, V] and chosen tokens [B]."""
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(logprobs, token[:, None], axis=-1, mode="clip")[:, 0]
        best, tokens = jax.lax.top_k(logprobs, min(ALTERNATIVES, logits.shape[-1]))
        return cls(chosen, tokens, best)


def _first_highest(logits: jax.Array) -> jax.Array:
    """argmax over the last axis, int32, as two reductions of numbers. On a CPU XLA vectorizes these, but not its own
    argmax, which takes ten times as long over 49152 logits: a twentieth of SmolLM2-135M's step."""
    highest = logits.max(axis=-1, keepdims=True)
    index, size = jnp.arange(logits.shape[-1], dtype=jnp.int32), logits.shape[-1]
    return jnp.where((logits == highest) | jnp.isnan(logits), index, size).min(axis=-1)


@functools.partial(
    register_dataclass,
    data_fields=["temperature", "top_k", "top_p", "min_p", "seed", "penalties"],
    meta_fields=["greedy", "scored"],
)
@dataclasses.dataclass(frozen=True)
class Sampler:
    """How to choose a token. Numbers are traced: one program is greedy, one other samples with any settings.

    Penalties and scores make programs of their own, because they cost time in each step.

    Attributes:
        temperature: float32 > 0.
        top_k: int32; only this many likeliest tokens stay. The vocabulary's size keeps all.
        top_p: float32; only the likeliest tokens that together have this probability stay. 1 keeps all.
        min_p: float32; only tokens with at least this share of the likeliest one's probability stay. 0 keeps all.
        seed: uint32 [2], the high and the low half.
        penalties: or None.
        greedy: take the likeliest token, whatever the fields above but penalties say. Static, because compiling the
            sampler takes as long as compiling a small model.
        scored: give `Scores`.
    """

    temperature: np.ndarray | jax.Array
    top_k: np.ndarray | jax.Array
    top_p: np.ndarray | jax.Array
    min_p: np.ndarray | jax.Array
    seed: np.ndarray | jax.Array
    penalties: Penalties | None
    greedy: bool
    scored: bool

    @classmethod
    def of(
        cls,
        vocabulary: int,
        temperature: Any = 0.0,
        top_k: Any = None,
        top_p: Any = None,
        min_p: Any = None,
        seed: Any = None,
        penalties: Penalties | None = None,
        scored: bool = False,
    ) -> "Sampler":
        """A sampler from a user's settings; None means no limit, temperature 0 is greedy.

        Args:
            seed: any integer, taken modulo 2**64; None is 0.

        Raises:
            TypeError: a setting is no number of its kind.
            ValueError: a setting is out of range, or one is given that temperature 0 would ignore.
        """
        need = f"0, which is greedy, or a number from {LEAST_TEMPERATURE} to 1e38 is needed"
        temperature = real("temperature", temperature, lambda t: t == 0 or LEAST_TEMPERATURE <= t <= 1e38, need)
        given = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
        if top_k is not None:
            top_k = integer("top_k", top_k, 1, advice=", as so many tokens stay; use None for no limit")
        if top_p is not None:
            real("top_p", top_p, lambda p: 0 < p <= 1, "a number in (0, 1] is needed; use None for no limit")
        if min_p is not None:
            real("min_p", min_p, lambda p: 0 <= p <= 1, "a number in [0, 1] is needed; use None for no limit")
        if seed is not None:
            seed = integer("seed", seed, -(2**128), 2**128)
        ignored = [f"{name} is {value}" for name, value in given.items() if value is not None]
        if temperature == 0 and ignored:
            raise ValueError(
                f"{' and '.join(ignored)}, and temperature 0 takes the likeliest token whatever these say; "
                "set a temperature above 0, or leave them out"
            )
        return cls(
            np.asarray(temperature, np.float32),
            np.asarray(vocabulary if top_k is None else min(top_k, vocabulary), np.int32),
            np.asarray(1.0 if top_p is None else top_p, np.float32),
            np.asarray(0.0 if min_p is None else min_p, np.float32),
            np.asarray(divmod((seed or 0) % 2**64, 2**32), np.uint32),
            penalties,
            greedy=temperature == 0,
            scored=scored,
        )

    def counts(self, tokens: jax.Array, start: jax.Array, vocabulary: int) -> Counts | None:
        """What penalties need to know of the prompts (see `Counts.of`); None without penalties."""
        return None if self.penalties is None else Counts.of(tokens, start, vocabulary)

    def draw(
        self, logits: jax.Array, counts: Counts | None, step: jax.Array | int
    ) -> tuple[jax.Array, Counts | None, Scores | None]:
        """The next token of each row, the counts with it, and scores if asked for; equal seeds and steps draw equally.

        Args:
            logits: float32 [B, V].
            counts: of the text so far, as `counts` or `draw` gave them.
            step: int32, the number of tokens drawn before.

        Returns:
            The tokens are int32 [B], INVALID where a row's logits are NaN, +inf or all -inf.
        """
        if self.penalties is None or counts is None:
            return (token := self.sample(logits, step)), counts, Scores.of(logits, token) if self.scored else None
        token = self.sample(self.penalties.apply(logits, counts), step)
        return token, counts.add(token), Scores.of(logits, token) if self.scored else None

    def sample(self, logits: jax.Array, step: jax.Array | int) -> jax.Array:
        """float32 logits [B, V] -> int32 tokens [B]; INVALID as `draw` says."""
        # If a row has a NaN, this is its index; and the rest of the loop only looks at this one logit.
        best = _first_highest(logits)
        most = jnp.take_along_axis(logits, best[:, None], axis=-1)
        token = best
        if not self.greedy:
            # Near 0, where float32 is finest, a small temperature divides the logits that matter.
            scaled = (logits - most) / self.temperature
            limited = (self.top_k < logits.shape[-1]) | (self.top_p < 1) | (self.min_p > 0)
            # A branch, because the sort behind it costs more than the rest of sampling together.
            scaled = jax.lax.cond(limited, self._limit, lambda scaled: scaled, scaled)
            key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(self.seed), impl="threefry2x32"), step)
            token = jax.random.categorical(key, scaled, axis=-1).astype(jnp.int32)
        return jnp.where(jnp.isfinite(most[:, 0]), token, INVALID)

    def _limit(self, scaled: jax.Array) -> jax.Array:
        """Sets all scaled logits [B, V] except those of the top-k, top-p and min-p tokens to -inf.

        As in `transformers`, each limit applies to the tokens that those before it keep, and the likeliest token always
        stays. Top-p is that of arXiv:1904.09751, min-p that of arXiv:2407.01082.
        """
        order = jnp.argsort(scaled, axis=-1, descending=True)
        ranked = jnp.take_along_axis(scaled, order, axis=-1)
        rank = jnp.arange(scaled.shape[-1])[None]
        ranked = jnp.where(rank < self.top_k, ranked, -jnp.inf)
        probability = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        # A float32 sum may reach 1 before the last token, and top_p = 1 must still keep every token.
        stays = (before < self.top_p) | (self.top_p >= 1)
        stays = (rank == 0) | (stays & (ranked >= ranked[:, :1] + jnp.log(self.min_p)))
        ranked = jnp.where(stays, ranked, -jnp.inf)
        return jnp.put_along_axis(scaled, order, ranked, axis=-1, inplace=False)
