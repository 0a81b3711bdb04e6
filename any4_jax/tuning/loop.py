"""The loop of an end-to-end training: what the float model predicts, steps towards it, and what a killed run left."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from any4_jax.methods.base import Result
from any4_jax.methods.matrices import Finished
from any4_jax.methods.tune_steps import Best, Drawn, begun, looks_at, stepped
from any4_jax.models.base import Decoder
from any4_jax.models.program import Program
from any4_jax.tuning.student import Run, Stack, outputs
from any4_jax.walk.capture import embed, positions_of
from any4_jax.walk.program import BlockProgram
from any4_jax.walk.records import contents_of

_CHUNK_TOKENS = 1024
"""Tokens whose logits, of both models, are in memory at a time: at 128,000 tokens of a vocabulary 0.5 GB each."""


class Rows(NamedTuple):
    """Tokens int32 [R, T], which of them count, bool [R, T], and what enters the float model's head, [R, T, E], on the
    host."""

    tokens: np.ndarray
    counted: np.ndarray
    targets: np.ndarray


@dataclasses.dataclass(frozen=True)
class Heads:
    """What comes before the blocks and after them, of both models: their static parts, an argument of jit."""

    model: Program
    teacher: Program


class State(NamedTuple):
    """A training after `at` steps: int32 []. `moves` are zero where it starts."""

    at: jax.Array
    moves: Any
    moments: Any
    best: Best


def targets_of(teacher: Decoder, tokens: np.ndarray, batch: int) -> np.ndarray:
    """What enters the float model's head for tokens [R, T]: [R, T, E], on the host. Rows run `batch` at a time."""
    length = tokens.shape[1]
    caches = jax.eval_shape(lambda: teacher.init_cache(batch, length))
    blocks = [
        (BlockProgram.of(type(teacher).block, block, cache), contents_of(block))
        for block, cache in zip(teacher.blocks, caches, strict=True)
    ]
    found = []
    for first in range(0, len(tokens), batch):
        rows = tokens[first : first + batch]
        x = embed(teacher, jnp.asarray(np.pad(rows, ((0, batch - len(rows)), (0, 0)), mode="edge")))
        for program, contents in blocks:
            x = _run(program, contents, x)
        found.append(np.asarray(x)[: len(rows)])
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=0)
def _run(program: BlockProgram, contents: Any, x: jax.Array) -> jax.Array:
    return program(contents, x)


def train(
    model: Decoder,
    teacher: Decoder,
    stacks: Sequence[Stack],
    moves: list[Any],
    rows: Rows,
    draw: Drawn,
    learning_rate: float,
    *,
    mesh: Mesh | None,
    progress: Callable[[int, int, str], None] | None,
    kept: "Keeping | None",
) -> Best:
    """The best moves, with their held-out divergence, in nats per token, and that of the start.

    Raises:
      ValueError: the start's divergence is not finite.
    """
    (program, leaves), (other, others) = outside_of_blocks(model), outside_of_blocks(teacher)
    heads, runs = Heads(program, other), tuple(stack.run for stack in stacks)
    place = _placing(mesh)
    constant = place(((leaves, others), [stack.contents for stack in stacks]), rows=False)
    state = State(jnp.int32(0), moves, _begun(moves), Best.none(moves))
    state = place(state if kept is None else kept.resumed(state), rows=False)
    steps, rate = len(draw.order), jnp.float32(learning_rate)

    def taken(index: np.ndarray) -> Any:
        return place(tuple(each[index] for each in rows), rows=True)

    def judged(moves: Any) -> jax.Array:
        sums = [
            _judged(runs, heads, constant, moves, taken(index), place(once, rows=True))
            for index, once in zip(draw.held, draw.once, strict=True)
        ]
        nats, tokens = (sum(each) for each in zip(*sums, strict=True))
        return nats / jnp.maximum(tokens, 1.0)

    while True:
        at = int(state.at)
        if looks_at(at, steps):
            state = state._replace(best=_looked(state.best, state.moves, judged(state.moves), state.at))
            if at == 0 and not np.isfinite(state.best.start):
                raise ValueError(
                    f"got a divergence of {float(state.best.start)} before any step, and training needs finite "
                    "predictions; float16 overflows that way, so load both models with dtype='bfloat16' or 'float32'"
                )
            if kept is not None and 0 < at < steps:
                kept.keep(state)
        if at == steps:
            return state.best if mesh is None else jax.device_get(state.best)
        moves, moments, loss = _step(
            runs, heads, steps, constant, state.moves, state.moments, state.at, taken(draw.order[at]), rate
        )
        state = State(state.at + 1, moves, moments, state.best)
        if progress is not None:
            progress(at + 1, steps, f"KL {float(loss):.4f}, held out {float(state.best.error):.4f}")


def outside_of_blocks(model: Decoder) -> tuple[Program, list[Any]]:
    """A model for `embed` and `head` alone: its arrays, with empty ones in the place of those of its blocks, which a
    mesh would hold on every device."""
    program, leaves = Program.of(model)
    inside = {id(leaf) for block in model.blocks for leaf in jax.tree.leaves(block)}
    return program, [jnp.zeros(0) if id(leaf) in inside else leaf for leaf in leaves]


def _placing(mesh: Mesh | None) -> Callable[..., Any]:
    """(arrays, rows) -> the arrays on the devices of a mesh, split along their first axis if they are rows."""
    # Models are written for axes along which XLA places arrays by itself.
    mesh = None if mesh is None else Mesh(mesh.devices, mesh.axis_names)

    def place(tree: Any, *, rows: bool) -> Any:
        if mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        spec = PartitionSpec(mesh.axis_names[0]) if rows else PartitionSpec()
        return jax.device_put(tree, NamedSharding(mesh, spec))

    return place


_begun = jax.jit(begun)
_looked = jax.jit(lambda best, moves, error, at: best.after(moves, error, at))


def _nats(
    runs: Sequence[Run], heads: Heads, constant: Any, moves: Any, rows: Any, once: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The sum over the tokens of some rows of KL(float || quantized), in nats; and the number of these tokens."""
    (leaves, contents), (tokens, counted, targets) = constant, rows
    model, teacher = heads.model.model(leaves[0]), heads.teacher.model(leaves[1])
    x = outputs(runs, contents, moves, model.embed(tokens, positions_of(tokens)))
    counted = counted if once is None else counted & once[:, None]
    batch, length = tokens.shape
    size = max(1, min(length, _CHUNK_TOKENS // batch))

    def chunks(a: jax.Array) -> jax.Array:
        short = -length % size
        a = jnp.pad(a, ((0, 0), (0, short), *[(0, 0)] * (a.ndim - 2)))
        return jnp.moveaxis(a.reshape(batch, -1, size, *a.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def look(each: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        x, wanted, counted = each
        q, p = (jax.nn.log_softmax(one, axis=-1) for one in (model.head(x), teacher.head(wanted)))
        # What the float model rules out adds nothing, though its logarithm is infinite.
        off = jnp.where(p == -jnp.inf, 0.0, jnp.exp(p) * (p - q)).sum(axis=-1)
        return jnp.where(counted, off, 0.0).sum()

    nats = jax.lax.map(look, (chunks(x), chunks(targets), chunks(counted))).sum()
    return nats, counted.sum(dtype=jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _judged(runs: tuple[Run, ...], heads: Heads, constant: Any, moves: Any, rows: Any, once: jax.Array) -> Any:
    return _nats(runs, heads, constant, moves, rows, once)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4, 5))
def _step(
    runs: tuple[Run, ...],
    heads: Heads,
    steps: int,
    constant: Any,
    moves: Any,
    moments: Any,
    at: jax.Array,
    rows: Any,
    rate: jax.Array,
) -> tuple[Any, Any, jax.Array]:
    """(moves, moments) after one more step, and the divergence before it on the step's rows."""

    def loss(moves: Any) -> jax.Array:
        nats, tokens = _nats(runs, heads, constant, moves, rows, None)
        return nats / jnp.maximum(tokens, 1.0)

    value, slope = jax.value_and_grad(loss)(moves)
    return *stepped(moves, slope, moments, at, steps, rate), value


@dataclasses.dataclass(frozen=True)
class Keeping:
    """Where the state of a training is kept for a run that was killed, under a digest of all that determines it."""

    store: Finished
    key: str

    def keep(self, state: State) -> None:
        arrays = {str(place): leaf for place, leaf in enumerate(jax.tree.leaves(state))}
        self.store.put("tune", self.key, Result(arrays, {}))

    def resumed(self, state: State) -> State:
        """What was kept, or the state given here if nothing was."""
        found = self.store.get("tune", self.key)
        leaves, structure = jax.tree.flatten(state)
        if found is None:
            return state
        return jax.tree.unflatten(structure, [found.operator[str(place)] for place in range(len(leaves))])
