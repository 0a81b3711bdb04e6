"""A quantized decoder as a function of what is trained of it: its blocks, stacked where they have one structure."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax.methods.tune_student import Student
from any4_jax.models.base import Decoder
from any4_jax.walk.program import BlockProgram, Shapes
from any4_jax.walk.records import contents_of, with_contents
from any4_jax.weights import is_operator, trimmed, with_room


@dataclasses.dataclass(frozen=True)
class Run:
    """Blocks that follow each other and have one structure, without their arrays: a static argument of jit.

    Attributes:
      program: of the float blocks, whose kernels take the place of codes.
      shapes: of a block's contents as quantized.
      named: the contents that are trained, with the dtype in which their matrices are multiplied.
      norms: whether the scales of norms, and biases, are trained too.
    """

    program: BlockProgram
    shapes: Shapes
    named: tuple[tuple[str, str], ...]
    norms: bool

    def student(self, contents: dict[str, Any]) -> Student:
        """One block of the run."""
        return Student(contents, dict(self.named), {}, norms=self.norms)


@dataclasses.dataclass(frozen=True)
class Stack:
    """The blocks of a run: their contents, with a leading axis, and the numbers of the first and of the one after."""

    run: Run
    contents: dict[str, Any]
    first: int
    after: int


def stacks_of(model: Decoder, teacher: Decoder, batch: int, length: int, *, norms: bool) -> list[Stack]:
    """The blocks of a quantized model, for inputs [batch, length, E].

    Args:
      model: the quantized one.
      teacher: the float one, whose blocks say how dense matrices are multiplied.
      batch, length: of the inputs.
      norms: see `Run`.
    """
    caches = jax.eval_shape(lambda: teacher.init_cache(batch, length))
    found: list[tuple[Run, list[dict[str, Any]]]] = []
    for block, float_block, cache in zip(model.blocks, teacher.blocks, caches, strict=True):
        # Blocks whose matrices have about as many outliers have one structure.
        contents = with_room(contents_of(block))
        named = tuple((name, str(model.dtype)) for name, leaf in contents.items() if is_operator(leaf))
        program = BlockProgram.of(type(model).block, float_block, cache)
        run = Run(program, Shapes.of(contents), named, norms)
        if not found or found[-1][0] != run:
            found.append((run, []))
        found[-1][1].append(contents)
    stacks, first = [], 0
    for run, each in found:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        stacks.append(Stack(run, stacked, first, first + len(each)))
        first += len(each)
    return stacks


@functools.partial(jax.jit, static_argnums=0)
def at_rest(run: Run, contents: dict[str, Any]) -> Any:
    """Zeros for all that is trained of a stack's blocks."""
    return jax.vmap(lambda own: run.student(own).at_rest())(contents)


def outputs(runs: Sequence[Run], contents: Sequence[Any], moves: Sequence[Any], x: jax.Array) -> jax.Array:
    """What the last block gives for an input [B, T, E] of the first. A backward pass runs each block again, so that no
    more than the inputs of blocks are kept."""

    def block(run: Run, x: jax.Array, each: tuple[Any, Any]) -> tuple[jax.Array, None]:
        own, moved = each
        return run.program(run.student(own).dense(moved), x), None

    for run, own, moved in zip(runs, contents, moves, strict=True):
        body = jax.checkpoint(functools.partial(block, run), prevent_cse=False)
        x, _ = jax.lax.scan(body, x, (own, moved))
    return x


@functools.partial(jax.jit, static_argnums=0)
def _stored(run: Run, contents: dict[str, Any], moves: Any) -> dict[str, Any]:
    return jax.lax.map(lambda each: run.student(each[0]).stored(each[1]), (contents, moves))


def blocks_of(model: Decoder, stacks: Sequence[Stack], moves: Sequence[Any]) -> dict[str, Any]:
    """The blocks of the model as trained, by path."""
    made = {}
    for stack, moved in zip(stacks, moves, strict=True):
        stored = _stored(stack.run, stack.contents, moved)
        for place, index in enumerate(range(stack.first, stack.after)):
            own: Mapping[str, Any] = contents_of(model.blocks[index])
            new = {**own, **trimmed(jax.tree.map(lambda leaf, place=place: leaf[place], stored))}
            made[model.block_path(index)] = with_contents(model.blocks[index], own, new)
    return made
