"""The CUDA body of error compensation: on a GPU against float64 and xla, elsewhere lowering and words."""

from __future__ import annotations

import functools
from typing import Any

import compensation_blocks as blocks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax.compensation import Grid, backends, compensate
from cuda_ffi import compensation, registration

TARGET = compensation.TARGETS["cuda"]
why_not = registration.why_not("cuda")
native = pytest.mark.skipif(why_not is not None, reason=str(why_not))
gpu = pytest.mark.skipif(jax.default_backend() != "gpu" or why_not is not None, reason="needs an NVIDIA GPU")


@functools.partial(jax.jit, static_argnames="uniform")
def run(own, wanted, corner, levels, uniform):
    return compensation.compensate(own, wanted, corner, *levels, kind="cuda", uniform=uniform)


def solve(block: blocks.Block) -> tuple[np.ndarray, np.ndarray]:
    codes, errors = run(*block)
    return np.asarray(codes), np.asarray(errors)


@gpu
@pytest.mark.parametrize("case", blocks.CASES, ids=blocks.case_name)
def test_codes_and_errors(case: dict[str, Any]) -> None:
    block = blocks.make_block(**case)
    blocks.check_against_float64(block, *solve(block))


@gpu
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 5])
def test_borders(bits: int, uniform: bool) -> None:
    block = blocks.edges(bits, uniform)
    np.testing.assert_array_equal(solve(block)[0], blocks.codes_of_edges(block))


@gpu
def test_rows_are_alone() -> None:
    block = blocks.make_block(columns=128, rows=100, bits=4)
    blocks.check_rows_are_alone(solve, block)
    blocks.check_what_is_not_finite_stays_in_its_row(solve, block)


@gpu
def test_a_whole_matrix() -> None:
    blocks.check_compensate("cuda")


@gpu
@pytest.mark.parametrize(("columns", "rows"), [(0, 5), (5, 0), (0, 0)])
def test_an_empty_block(columns: int, rows: int) -> None:
    nothing, corner = np.zeros((columns, rows), np.float32), np.zeros((columns, columns), np.float32)
    levels = blocks.Levels(np.zeros((rows, 4), np.float32), nothing, None)
    codes, errors = solve(blocks.Block(nothing, nothing, corner, levels, False))
    assert codes.shape == errors.shape == (columns, rows)


@gpu
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scales": np.ones((7, 4), np.float32)}, "shapes"),
        ({"table": np.zeros((5, 3), np.float32)}, "a power of two"),
        ({"table": np.zeros((5, 512), np.float32)}, "a power of two"),
    ],
)
def test_the_handler_refuses(change: dict[str, np.ndarray], words: str) -> None:
    block = blocks.make_block(columns=7, rows=5, bits=2)
    with pytest.raises(Exception, match=words):
        solve(block._replace(levels=block.levels._replace(**change)))


def lowered(function, *arguments) -> str:
    """StableHLO for an NVIDIA GPU, which this machine needn't have."""
    checks = [jax.export.DisabledSafetyCheck.custom_call(TARGET)]
    return jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(*arguments).mlir_module()


@native
def test_a_matrix_is_lowered_to_one_call_in_one_loop() -> None:
    shape = jax.ShapeDtypeStruct((6, 96), jnp.float32)
    scales = jax.ShapeDtypeStruct((6, 3), jnp.float32)
    table = jax.ShapeDtypeStruct((1, 16), jnp.float32)

    def run(w, upper, table, scales):
        return compensate(w, upper, Grid(table, scales, None), jnp.arange(96) // 32, block=48, uniform=False)

    text = lowered(run, shape, jax.ShapeDtypeStruct((96, 96), jnp.float32), table, scales)
    assert text.count(f"@{TARGET}(") == 1 and text.count("stablehlo.while") == 1


@pytest.mark.parametrize("platform", ["cpu", "tpu", "rocm"])
def test_what_it_declines_it_says(platform: str) -> None:
    assert backends.BACKENDS.named("cuda").supports(platform) == f"it runs on cuda, not on {platform}"


def test_without_the_library_xla_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_register", lambda kind: f"no {kind} library is built")
    assert backends.BACKENDS.named("cuda").supports("cuda") == "no cuda library is built"
    assert backends.BACKENDS.first(platform="cuda").name == "xla"
    with pytest.raises(RuntimeError, match="no cuda library is built"):
        solve(blocks.make_block(columns=7, rows=5, bits=2))
