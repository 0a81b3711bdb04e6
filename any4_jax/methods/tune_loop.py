"""The training of a block: Adam on tables, scales and offsets, sign descent on rounding, judged on rows held out."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.methods.base import Block
from any4_jax.methods.tune_leaf import NOTHING_TO_TRAIN
from any4_jax.methods.tune_steps import Best, begun, drawn, looks_at, stepped
from any4_jax.methods.tune_student import Student
from any4_jax.weights import is_operator

FIXED_CODES, MOVING_CODES = 8e-3, 2e-3
"""Learning rates. Where codes move too, tables follow them, and large steps would lead them astray."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a block is trained; see `any4_jax.methods.Tune` for what the fields mean."""

    steps: int
    batch: int
    learning_rate: float
    rounding: bool
    norms: bool = False
    held_out: float = 0.125
    seed: int = 0

    @classmethod
    def of(cls, method: Any, rounding: bool, **others: Any) -> "Settings":
        """The settings that the fields `steps`, `batch` and `learning_rate` of a method ask for."""
        rate = method.learning_rate or (MOVING_CODES if rounding else FIXED_CODES)
        return cls(method.steps, method.batch, rate, rounding, **others)


class Rows(NamedTuple):
    """What a block is trained on: its inputs and targets [R, T, E], and which tokens count, bool [R, T]."""

    inputs: jax.Array
    targets: jax.Array
    counted: jax.Array


class Trained(NamedTuple):
    """The block's contents after training; the held-out error before and after, relative to the targets' mean square,
    float32 []; and the step after which they were found, int32 []."""

    contents: Mapping[str, Any]
    before: jax.Array
    after: jax.Array
    step: jax.Array


def train_block(block: Block, contents: Mapping[str, Any], settings: Settings) -> Trained:
    """Trains what `contents` has of the block's assigned linears, until its outputs are closest to its targets on rows
    that are held out. No result is worse there than the start.

    Args:
      block: gives inputs, targets, and the function.
      contents: of the quantized block. Where rounding is trained, its codes stand for the block's own kernels.
      settings: how.

    Raises:
      ValueError: there are fewer than two rows, or nothing of the contents can be trained.
    """
    rows = _rows_of(block)
    count, length = rows.inputs.shape[:2]
    draw = drawn(count, settings.steps, settings.batch, settings.held_out, settings.seed)
    kernels = [f"{path}.kernel" for path in block.assigned]
    named = tuple((name, str(block.contents[name].dtype)) for name in kernels if is_operator(contents[name]))
    floats = {name: jnp.asarray(block.contents[name]) for name, _ in named} if settings.rounding else {}
    made = _train(
        block.program(draw.order.shape[1], length),
        named,
        settings.norms,
        dict(contents),
        floats,
        rows,
        draw.order,
        (draw.held, draw.once),
        np.float32(settings.learning_rate),
    )
    return made._replace(contents={**contents, **made.contents})


def _rows_of(block: Block) -> Rows:
    """The rows of all batches, padded to the longest."""
    targets, longest = block.targets(), max(x.shape[1] for x in block.inputs)

    def padded(arrays: list[Any]) -> jax.Array:
        short = (longest - a.shape[1] for a in arrays)
        return jnp.concatenate(
            [jnp.pad(a, ((0, 0), (0, s), *[(0, 0)] * (a.ndim - 2))) for a, s in zip(arrays, short, strict=True)]
        )

    return Rows(padded(block.inputs), padded(targets), padded([jnp.asarray(mask) for mask in block.masks]))


@functools.partial(jax.jit, static_argnames=("program", "named", "norms"))
def _train(
    program: Callable[[Mapping[str, Any], jax.Array], jax.Array],
    named: tuple[tuple[str, str], ...],
    norms: bool,
    contents: dict[str, Any],
    floats: dict[str, jax.Array],
    rows: Rows,
    order: jax.Array,
    held: tuple[jax.Array, jax.Array],
    learning_rate: jax.Array,
) -> Trained:
    """What has changed of the contents, and what was seen.

    `named` are the contents that are trained, with the dtypes of their float kernels; `floats` these kernels, for those
    whose rounding is trained; `order` int32 [steps, batch] the rows of each step; `held` those that are held out, int32
    [looks, batch], and which of them count.
    """
    student = Student(contents, dict(named), floats, norms=norms)
    steps = len(order)

    def squares(made: Any, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The squared errors of some rows [batch], a mean over channels and a sum over tokens; and the tokens."""
        y = program(made, rows.inputs[index]).astype(jnp.float32)
        off = jnp.square(y - rows.targets[index].astype(jnp.float32)).mean(axis=-1)
        counted = rows.counted[index]
        return jnp.where(counted, off, 0.0).sum(axis=-1), counted.sum(axis=-1, dtype=jnp.float32)

    energy = jnp.where(rows.counted, jnp.square(rows.targets.astype(jnp.float32)).mean(axis=-1), 0.0).sum()
    unit = jnp.where(energy > 0, energy, 1.0) / jnp.maximum(rows.counted.sum(dtype=jnp.float32), 1.0)

    def loss(moves: Any, index: jax.Array) -> jax.Array:
        errors, tokens = squares(student.dense(moves), index)
        return errors.sum() / jnp.maximum(tokens.sum(), 1.0) / unit

    def judged(moves: Any) -> jax.Array:
        made = student.dense(moves)

        def look(each: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            index, once = each
            errors, tokens = squares(made, index)
            return jnp.where(once, errors, 0.0).sum(), jnp.where(once, tokens, 0.0).sum()

        errors, tokens = jax.lax.map(look, held)
        return errors.sum() / jnp.maximum(tokens.sum(), 1.0) / unit

    first = student.at_rest()
    if not jax.tree.leaves(first):
        raise ValueError(f"got a block {NOTHING_TO_TRAIN}")

    def step(state: Any, each: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        (moves, moments, best), (at, index) = state, each
        best = jax.lax.cond(looks_at(at, steps), lambda: best.after(moves, judged(moves), at), lambda: best)
        slope = jax.grad(loss)(moves, index)
        moves, moments = stepped(moves, slope, moments, at, steps, learning_rate)
        return (moves, moments, best), None

    state = first, begun(first), Best.none(first)
    # What comes after the last step is looked at in one more, whose own step leads nowhere.
    turns = jnp.arange(steps + 1, dtype=jnp.int32), jnp.concatenate([order, order[:1]])
    (_, _, best), _ = jax.lax.scan(step, state, turns)
    return Trained(student.stored(best.moves), best.start, best.error, best.step)
