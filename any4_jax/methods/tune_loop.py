"""The training of a block: Adam on tables, scales and offsets, sign descent on rounding, judged on rows held out."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from any4_jax import scaling
from any4_jax.methods.base import Block
from any4_jax.methods.tune_leaf import Start, at_rest, started
from any4_jax.partition import combine, partition
from any4_jax.weights import is_operator

_RATES = {"table": 1.0, "scales": 0.15, "offsets": 1.0, "floats": 0.15}
"""Learning rates by kind, relative to that of tables. A scale moves all of a group's weights, most by several steps."""

_WARM_UP = 0.05
_LOOKS = 8
"""How often the held-out rows are looked at, beside the start."""


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
      ValueError: there are fewer than two rows.
    """
    rows = _rows_of(block)
    count, length = rows.inputs.shape[:2]
    if count < 2:
        raise ValueError(
            "got one row of tokens, and at least 2 are needed, one of which is held out; pass more data, or a smaller "
            "seqlen"
        )
    draw = np.random.default_rng(settings.seed)
    shuffled = draw.permutation(count)
    held = min(max(1, round(settings.held_out * count)), count - 1)
    batch = min(settings.batch, count - held)
    epochs = -(-settings.steps * batch // (count - held))
    order = np.concatenate([draw.permutation(shuffled[held:]) for _ in range(max(epochs, 1))])
    order = order[: settings.steps * batch].reshape(-1, batch)
    short = -held % batch
    looked = np.pad(shuffled[:held], (0, short), mode="edge").reshape(-1, batch)
    once = (np.arange(held + short) < held).reshape(-1, batch)
    kernels = [f"{path}.kernel" for path in block.assigned]
    named = tuple((name, str(block.contents[name].dtype)) for name in kernels if is_operator(contents[name]))
    floats = {name: jnp.asarray(block.contents[name]) for name, _ in named} if settings.rounding else {}
    made = _train(
        block.program(batch, length),
        named,
        settings.norms,
        dict(contents),
        floats,
        rows,
        order.astype(np.int32),
        (looked.astype(np.int32), once),
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
    student = _Student(contents, dict(named), floats, norms=norms)
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
    kinds = jax.tree_util.tree_map_with_path(lambda path, _: _kind(path), first)
    smooth = jax.tree.map(lambda kind: kind != "rounding", kinds)
    adam = optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-18)

    def step(state: Any, each: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        (moves, moments, best), (at, index) = state, each
        looks = (at % max(steps // _LOOKS, 1) == 0) | (at == steps)
        best = jax.lax.cond(looks, lambda: _better(best, moves, judged(moves), at), lambda: best)
        slope = jax.grad(loss)(moves, index)
        with jax.numpy_dtype_promotion("standard"):  # optax divides an integer
            direction, moments = adam.update(partition(slope, smooth)[0], moments)
        done = at.astype(jnp.float32) / steps
        rate = learning_rate * jnp.minimum((done + 1 / steps) / _WARM_UP, 1.0) * (1 + jnp.cos(jnp.pi * done)) / 2
        # In all it is half a step: a weight can just reach the next code, if all slopes agree.
        turn = (1 - done) / steps

        def moved(kind: str, value: jax.Array, along: jax.Array) -> jax.Array:
            if kind == "rounding":
                return jnp.clip(value - turn * jnp.sign(along), -0.5, 0.5)
            return value - rate * _RATES[kind] * along

        along = combine(direction, partition(slope, smooth)[1])
        return (jax.tree.map(moved, kinds, moves, along), moments, best), None

    nothing = _Best(first, jnp.float32(jnp.inf), jnp.int32(0), jnp.float32(jnp.nan))
    state = first, adam.init(partition(first, smooth)[0]), nothing
    # What comes after the last step is looked at in one more, whose own step leads nowhere.
    turns = jnp.arange(steps + 1, dtype=jnp.int32), jnp.concatenate([order, order[:1]])
    (_, _, best), _ = jax.lax.scan(step, state, turns)
    return Trained(student.stored(best.moves), best.start, best.error, best.step)


class _Best(NamedTuple):
    """The moves with the smallest held-out error so far, that error, their step; and the error of the start."""

    moves: Any
    error: jax.Array
    step: jax.Array
    start: jax.Array


def _better(best: _Best, moves: Any, error: jax.Array, step: jax.Array) -> _Best:
    """The best after a look; of equal ones it is the first."""
    won = error < best.error
    new = _Best(moves, error, step, best.start)
    kept = jax.tree.map(lambda new, old: jnp.where(won, new, old), new, best)
    return kept._replace(start=jnp.where(step == 0, error, best.start))


class _Student:
    """A quantized block as a function of what is trained of it."""

    def __init__(
        self, contents: dict[str, Any], dtypes: dict[str, str], floats: dict[str, jax.Array], *, norms: bool
    ) -> None:
        """`dtypes` are those of the float kernels of what is trained, by name; `floats` what their codes stand for."""
        self.contents, self.dtypes = contents, dtypes
        self.starts = {name: started(contents[name], floats.get(name)) for name in dtypes}
        self.vectors = _vectors(contents) if norms else []

    def at_rest(self) -> dict[str, Any]:
        """Zeros for all that is trained, by name."""

        def zeros(node: Any) -> dict[str, Any]:
            return at_rest(node.leaf, rounding=node.place is not None) if _is_start(node) else {}

        found = {name: jax.tree.map(zeros, start, is_leaf=_is_start) for name, start in self.starts.items()}
        return found | {name: {"floats": jnp.zeros(self.contents[name].shape, jnp.float32)} for name in self.vectors}

    def dense(self, moves: Mapping[str, Any]) -> dict[str, Any]:
        """The contents with dense matrices in the place of codes, and as float kernels where nothing else is there."""
        made = self.contents | self._vectors(moves)
        for name, dtype in self.dtypes.items():
            matrix = self._each(lambda start, own: start.matrix(own), name, moves)
            made[name] = matrix if is_operator(matrix) else jnp.swapaxes(matrix, -1, -2).astype(dtype)
        return made

    def stored(self, moves: Mapping[str, Any]) -> dict[str, Any]:
        """What is trained, as it is stored."""
        return self._vectors(moves) | {
            name: self._each(lambda start, own: start.moved(own), name, moves) for name in self.dtypes
        }

    def _each(self, function: Callable[[Start, Any], Any], name: str, moves: Mapping[str, Any]) -> Any:
        def applied(node: Any, own: Any) -> Any:
            return function(node, own) if _is_start(node) else node

        return jax.tree.map(applied, self.starts[name], moves[name], is_leaf=_is_start)

    def _vectors(self, moves: Mapping[str, Any]) -> dict[str, jax.Array]:
        made = {}
        for name in self.vectors:
            old = self.contents[name].astype(jnp.float32)
            value = old + jnp.sqrt(jnp.square(old).mean()) * moves[name]["floats"]
            dtype = self.contents[name].dtype
            made[name] = scaling.straight_through(
                scaling.rounded(jax.lax.stop_gradient(value), dtype), value.astype(dtype)
            )
        return made


def _is_start(node: Any) -> bool:
    return isinstance(node, Start)


def _vectors(contents: Mapping[str, Any]) -> list[str]:
    """The names of floating arrays of one axis: the scales of norms, and biases."""
    plain = {name: leaf for name, leaf in contents.items() if not is_operator(leaf)}
    return [name for name, leaf in plain.items() if leaf.ndim == 1 and jnp.issubdtype(leaf.dtype, jnp.floating)]


def _kind(path: Any) -> str:
    """What a leaf of the moves is: the last key on the way to it."""
    return path[-1].key
