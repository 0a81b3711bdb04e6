"""The C++ body of error compensation: every instruction set against float64 and xla, threads, vmap, life without it."""

from __future__ import annotations

import functools

import compensation_blocks as blocks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax.compensation import Grid, backends, compensate
from cuda_ffi import compensation, registration

TARGET = compensation.TARGETS["cpu"]


@functools.partial(jax.jit, static_argnames=("uniform", "isa"))
def run(own, wanted, corner, levels, uniform, isa):
    return compensation.compensate(own, wanted, corner, *levels, kind="cpu", uniform=uniform, isa=isa)


def solve(block, isa="auto"):
    return tuple(np.asarray(a) for a in run(*block, isa=isa))


@pytest.mark.parametrize("case", blocks.CASES, ids=blocks.case_name)
def test_codes_and_errors(case, isa):
    block = blocks.make_block(**case)
    blocks.check_against_float64(block, *solve(block, isa))


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 5])
def test_borders(bits, uniform, isa):
    block = blocks.edges(bits, uniform)
    np.testing.assert_array_equal(solve(block, isa)[0], blocks.codes_of_edges(block))


def test_rows_are_alone(isa, one_thread, library):
    block = blocks.make_block(columns=128, rows=100, bits=4)
    alone = solve(block, isa)
    library.any4_cpu_limit_threads(2)
    for mine, theirs in zip(solve(block, isa), alone, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    blocks.check_rows_are_alone(lambda block: solve(block, isa), block)
    blocks.check_what_is_not_finite_stays_in_its_row(lambda block: solve(block, isa), block)


def test_a_whole_matrix(library):
    blocks.check_compensate("cpu")


@pytest.mark.parametrize("columns, rows", [(0, 5), (5, 0), (0, 0)])
def test_an_empty_block(columns, rows, library):
    nothing, corner = np.zeros((columns, rows), np.float32), np.zeros((columns, columns), np.float32)
    levels = blocks.Levels(np.zeros((rows, 4), np.float32), nothing, None)
    codes, errors = solve(blocks.Block(nothing, nothing, corner, levels, False))
    assert codes.shape == errors.shape == (columns, rows)


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("over", ["rows", "corners"])
def test_vmap(over, offsets, library):
    """Over rows it stays one call; each corner takes a turn of a loop."""
    block = blocks.make_block(columns=48, rows=60, bits=3, offsets=offsets)
    corners = np.stack([block.corner, np.eye(48, dtype=np.float32)])
    shared = over == "rows"

    def call(own, wanted, corner, levels):
        return compensation.compensate(own, wanted, corner, *levels, kind="cpu", uniform=False)

    parts = [block.of_rows(slice(start, start + 20)) for start in (0, 20, 40)]
    rows = jax.tree.map(lambda *a: jnp.stack(a), *((p.own, p.wanted, p.levels) for p in parts))
    own, wanted, levels = rows if shared else (block.own, block.wanted, block.levels)
    axes = (0, 0, None, 0) if shared else (None, None, 0, None)
    batched = jax.jit(jax.vmap(call, in_axes=axes))
    operands = (own, wanted, block.corner if shared else corners, levels)
    text = batched.lower(*operands).as_text()
    assert text.count(f"@{TARGET}(") == 1 and ("stablehlo.while" in text) == (not shared)
    expected = [solve(p) for p in parts] if shared else [solve(block._replace(corner=c)) for c in corners]
    for mine, theirs in zip(batched(*operands), zip(*expected, strict=True), strict=True):
        np.testing.assert_array_equal(mine, np.stack(theirs))


def lowered(rows: int, platform: str, backend: str | None = None) -> str:
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, 8), (8, 8), (1, 4), (rows, 1))]

    def run(w, upper, table, scales):
        groups = jnp.zeros(8, jnp.int32)
        return compensate(w, upper, Grid(table, scales, None), groups, block=8, uniform=True, backend=backend)

    return jax.jit(run).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def test_the_platform_decides_where_the_program_is_lowered(library):
    assert TARGET in lowered(2, "cpu")
    assert TARGET not in lowered(2, "cuda") and TARGET not in lowered(2, "cpu", "xla")


def test_without_a_library(monkeypatch):
    monkeypatch.setattr(registration, "_register", lambda kind: f"no {kind} library is built")
    assert TARGET not in lowered(3, "cpu")
    with pytest.raises(ValueError, match="no cpu library is built"):
        lowered(3, "cpu", "cpu")
    with pytest.raises(RuntimeError, match="no cpu library is built"):
        solve(blocks.make_block(columns=7, rows=5, bits=2))


def test_a_backend_that_there_is_not_or_that_runs_elsewhere_is_refused():
    with pytest.raises(ValueError, match="backend='fast', need one of .*'xla'"):
        lowered(2, "cpu", "fast")
    assert backends.BACKENDS.named("cpu").supports("cuda") == "it runs on cpu, not on cuda"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"isa": "sse9"}, "isa=sse9"),
        ({"scales": np.ones((7, 4), np.float32)}, "shapes"),
        ({"table": np.zeros((5, 3), np.float32)}, "a power of two"),
        ({"table": np.zeros((5, 512), np.float32)}, "a power of two"),
    ],
)
def test_the_handler_refuses(change, words, library):
    block, isa = blocks.make_block(columns=7, rows=5, bits=2), change.pop("isa", "auto")
    with pytest.raises(Exception, match=words):
        solve(block._replace(levels=block.levels._replace(**change)), isa)
