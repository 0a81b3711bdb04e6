"""How far one model's predictions are from another's: Kullback-Leibler divergence, top-1 agreement and flips.

A method that fits a text can lower a model's loss on it without coming back to the model that it started from. These
tell how near it came, whatever the text says. Flips are those of "Accuracy is Not All You Need" (arXiv:2407.09141),
counted on next tokens: equal accuracy may hide as many answers lost as won.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.evaluation.cached import reading
from any4_jax.evaluation.perplexity import Perplexity
from any4_jax.evaluation.windows import Progress, batches, cut, resampled_error
from any4_jax.kv_cache import CacheFactory

Model = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True, eq=False)
class Divergence:
    """What `divergence` measured. Position t of a window is the prediction from its first t + 1 tokens.

    Attributes:
      token_kl: float32 [windows, seqlen - 1], KL(reference || model) of each prediction in nats, at least 0.
      token_top1: bool [windows, seqlen - 1], whether both models have the same likeliest token.
      token_flip: int8 [windows, seqlen - 1]: -1 where the likeliest token is the text's in the reference alone, 1
        where it is in the model alone, 0 elsewhere.
      reference, model: the perplexity of each on the same windows.
    """

    token_kl: np.ndarray
    token_top1: np.ndarray
    token_flip: np.ndarray
    reference: Perplexity
    model: Perplexity

    @cached_property
    def window_kl(self) -> np.ndarray:
        """The mean KL of each window in nats per token, float64 [windows]."""
        return self.token_kl.mean(axis=1, dtype=np.float64)

    @cached_property
    def window_top1(self) -> np.ndarray:
        """The share of each window's predictions whose likeliest tokens agree, float64 [windows]."""
        return self.token_top1.mean(axis=1, dtype=np.float64)

    @cached_property
    def position_kl(self) -> np.ndarray:
        """The mean KL at each position of a window in nats, float64 [seqlen - 1]: how errors grow with the context."""
        return self.token_kl.mean(axis=0, dtype=np.float64)

    @cached_property
    def position_top1(self) -> np.ndarray:
        """The share of agreeing predictions at each position of a window, float64 [seqlen - 1]."""
        return self.token_top1.mean(axis=0, dtype=np.float64)

    @cached_property
    def kl(self) -> float:
        """The mean of the window means, in nats per token."""
        return float(self.window_kl.mean())

    @cached_property
    def top1(self) -> float:
        """The share of all predictions on which both models' likeliest tokens agree, 0 to 1."""
        return float(self.window_top1.mean())

    @property
    def lost(self) -> float:
        """The share of all predictions that the reference alone has right."""
        return float((self.token_flip < 0).mean())

    @property
    def won(self) -> float:
        """The share of all predictions that the model alone has right."""
        return float((self.token_flip > 0).mean())

    @property
    def flips(self) -> float:
        """The share of all predictions that one of the two has right and the other wrong: lost + won."""
        return self.lost + self.won

    def kl_quantile(self, share: float = 0.99) -> float:
        """The KL of a prediction, in nats, that this share of all predictions doesn't exceed.

        Raises:
          ValueError: the share is not in 0 to 1.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"got a share of {share}, and one from 0 to 1 is needed; 0.99 is the 99th percentile")
        return float(np.quantile(self.token_kl.astype(np.float64), share))

    def bootstrap(self, n: int = 2000, seed: int = 0) -> float:
        """The standard error of `kl`, from n resamplings of the windows; 0 if there is one window."""
        return resampled_error(self.window_kl, n, seed)


def divergence(
    reference: Model,
    model: Model,
    text_or_ids: str | Sequence[int] | np.ndarray | jax.Array,
    *,
    seqlen: int | None = None,
    windows: int | None = None,
    progress: Progress | None = None,
    cache: CacheFactory | None = None,
    allow_training_text: bool = False,
) -> Divergence:
    """How far the predictions of `model` are from those of `reference` on a text.

    The windows and the predicted tokens are those of `perplexity`, and one pass gives both models' perplexity too. The
    softmax is computed in float32. One window's logits of both models are in memory at a time; windows below 2048
    tokens are batched up to that many.

    Args:
      reference: the float model: maps int32 tokens [B, T] to logits [B, T, V]. A text needs its `.tokenizer`.
      model: the quantized one, with the same tokens.
      text_or_ids, seqlen, windows, progress: as in `perplexity`; seqlen=None heeds the shorter of the two contexts.
      cache: as in `perplexity`, for `model` alone.
      allow_training_text: as in `perplexity`.

    Raises:
      ValueError: as `perplexity` does, or the two have different vocabularies.
      TypeError: as `perplexity` does.
    """
    rows = cut((reference, model), text_or_ids, seqlen, windows, allow_training_text=allow_training_text)
    run, found = reading(model, cache), np.empty((5, len(rows), rows.shape[1] - 1), np.float32)
    for index, batch in batches(rows, progress):
        tokens = jnp.asarray(batch)
        before, after = reference(tokens), run(tokens)
        if before.shape != after.shape:
            raise ValueError(
                f"got logits of {before.shape[-1]} tokens from the reference and of {after.shape[-1]} from the model, "
                "and both need the same vocabulary; pass two forms of one model"
            )
        found[:, index] = np.asarray(_compared(before, after, tokens))
    kl, top1, flip, *nll = found
    perplexities = (Perplexity(each.mean(axis=1, dtype=np.float64), rows.shape[1]) for each in nll)
    return Divergence(kl, top1 == 1, flip.astype(np.int8), *perplexities)


@jax.jit
def _compared(before: jax.Array, after: jax.Array, tokens: jax.Array) -> jax.Array:
    """KL(before || after), agreement, flip, and both losses: [B, T, V], [B, T, V], [B, T] -> float32 [5, B, T - 1]."""

    # Reductions in place of log_softmax, which would create arrays as large as the logits.
    def logs(logits: jax.Array) -> jax.Array:
        predicted = logits[:, :-1].astype(jnp.float32)
        return predicted - jax.nn.logsumexp(predicted, axis=-1, keepdims=True)

    p, q = logs(before), logs(after)
    # What the reference rules out adds nothing, though its log is infinite; NaN stays NaN.
    kl = jnp.where(p == -jnp.inf, 0.0, jnp.exp(p) * (p - q)).sum(axis=-1)
    first, second = jnp.argmax(p, axis=-1), jnp.argmax(q, axis=-1)
    following = tokens[:, 1:]
    top1 = (first == second).astype(jnp.float32)
    flip = (second == following).astype(jnp.float32) - (first == following).astype(jnp.float32)
    of_token = (-jnp.take_along_axis(each, following[..., None], axis=-1)[..., 0] for each in (p, q))
    # Rounding may leave the sum a little below 0.
    return jnp.stack([jnp.maximum(kl, 0.0), top1, flip, *of_token])
