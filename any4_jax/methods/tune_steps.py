"""Steps of a training: Adam on what is smooth, sign descent on rounding, and the best by the rows that are held out."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from any4_jax.partition import combine, partition

RATES = {"table": 1.0, "scales": 0.15, "offsets": 1.0, "floats": 0.15}
"""Learning rates by kind, relative to that of tables. A scale moves all of a group's weights, most by several steps."""

LOOKS = 8
"""How often the held-out rows are looked at, beside the start."""

_WARM_UP = 0.05
_ADAM = optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-18)


class Drawn(NamedTuple):
    """Which rows of tokens serve for what, by their numbers.

    Attributes:
      order: int32 [steps, batch], those of each step.
      held: int32 [looks, batch], those that are held out; the last is repeated to fill the batch.
      once: bool [looks, batch], False for what is repeated.
    """

    order: np.ndarray
    held: np.ndarray
    once: np.ndarray


def drawn(count: int, steps: int, batch: int, held_out: float, seed: int) -> Drawn:
    """Draws the rows of a training.

    Args:
      count: how many rows there are.
      steps: of the training; each row is taken once before any is taken again.
      batch: rows in a step, or all that aren't held out where these are fewer.
      held_out: the share of rows that is held out; at least one is.
      seed: of the draw.

    Raises:
      ValueError: there are fewer than two rows.
    """
    if count < 2:
        raise ValueError(
            "got one row of tokens, and at least 2 are needed, one of which is held out; pass more data, or a smaller "
            "seqlen"
        )
    draw = np.random.default_rng(seed)
    shuffled = draw.permutation(count)
    held = min(max(1, round(held_out * count)), count - 1)
    batch = min(batch, count - held)
    epochs = -(-steps * batch // (count - held))
    order = np.concatenate([draw.permutation(shuffled[held:]) for _ in range(max(epochs, 1))])
    order = order[: steps * batch].reshape(-1, batch)
    short = -held % batch
    looked = np.pad(shuffled[:held], (0, short), mode="edge").reshape(-1, batch)
    once = (np.arange(held + short) < held).reshape(-1, batch)
    return Drawn(order.astype(np.int32), looked.astype(np.int32), once)


def looks_at(at: Any, steps: int) -> Any:
    """Whether the held-out rows are looked at after `at` of the steps, a number or an array."""
    return (at % max(steps // LOOKS, 1) == 0) | (at == steps)


def begun(moves: Any) -> Any:
    """Adam's moments for moves that are at rest."""
    return _ADAM.init(partition(moves, _smooth(moves))[0])


def stepped(
    moves: Any, slope: Any, moments: Any, at: jax.Array, steps: int, learning_rate: jax.Array
) -> tuple[Any, Any]:
    """(moves, moments) after one more step.

    Args:
      moves: what is trained, by kind: see `any4_jax.methods.tune_leaf`.
      slope: the gradient, in the structure of the moves.
      moments: those before.
      at: int32 [], how many steps were taken.
      steps: of the whole training.
      learning_rate: float32 [], of tables. It rises over the first twentieth, and falls to zero by a cosine.
    """
    smooth = _smooth(moves)
    with jax.numpy_dtype_promotion("standard"):  # optax divides an integer
        direction, moments = _ADAM.update(partition(slope, smooth)[0], moments)
    done = at.astype(jnp.float32) / steps
    rate = learning_rate * jnp.minimum((done + 1 / steps) / _WARM_UP, 1.0) * (1 + jnp.cos(jnp.pi * done)) / 2
    # In all it is half a step: a weight can just reach the next code, if all slopes agree.
    turn = (1 - done) / steps

    def moved(kind: str, value: jax.Array, along: jax.Array) -> jax.Array:
        if kind == "rounding":
            return jnp.clip(value - turn * jnp.sign(along), -0.5, 0.5)
        return value - rate * RATES[kind] * along

    return jax.tree.map(moved, _kinds(moves), moves, combine(direction, partition(slope, smooth)[1])), moments


def _kinds(moves: Any) -> Any:
    """What each leaf of the moves is: the last key on the way to it."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, moves)


def _smooth(moves: Any) -> Any:
    return jax.tree.map(lambda kind: kind != "rounding", _kinds(moves))


class Best(NamedTuple):
    """The moves with the smallest held-out error so far, that error float32 [], their step int32 []; and the error of
    the start."""

    moves: Any
    error: jax.Array
    step: jax.Array
    start: jax.Array

    @classmethod
    def none(cls, moves: Any) -> "Best":
        """Before any look."""
        return cls(moves, jnp.float32(jnp.inf), jnp.int32(0), jnp.float32(jnp.nan))

    def after(self, moves: Any, error: jax.Array, step: jax.Array) -> "Best":
        """The best after a look; of equal ones it is the first."""
        won = error < self.error
        new = Best(moves, error, step, self.start)
        kept = jax.tree.map(lambda new, old: jnp.where(won, new, old), new, self)
        return kept._replace(start=jnp.where(step == 0, error, self.start))
