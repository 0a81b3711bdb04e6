"""The C++ solver: every instruction set against float64, threads, vmap, the choice of a backend, and life without it.

What every backend must do, tests/test_clustering.py asks of each.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kmeans_rows import METHODS, ROWS, least_error, make_rows, make_weights, partition_error, same

from any4_jax.clustering import backends, inits, kmeans_1d
from cuda_ffi import kmeans, registration

LENGTH = 160


def solve(rows, weights=None, k=16, solver="exact", init=None, isa="auto"):
    rows = np.asarray(rows, np.float32)
    if solver == "exact":
        found = kmeans.exact(rows, weights, k=k, isa=isa)
    else:
        numbers = inits.numbers(init, 2 * rows.shape[1], k, seed=0)
        start = backends._STARTS[init]
        found = kmeans.lloyd(rows, weights, numbers, np.float32(1e-4), k=k, start=start, max_iter=300, isa=isa)
    return tuple(np.asarray(a) for a in found)


def mixed(length: int) -> np.ndarray:
    return np.concatenate([make_rows(kind, 1, length, seed=length) for kind in ROWS])


@functools.cache
def least_errors(length: int, weighted: bool, k: int) -> list[float]:
    """The optimal error of each row of `mixed`, for all instruction sets."""
    rows = mixed(length)
    weights = make_weights(len(rows), length) if weighted else np.ones_like(rows)
    return [least_error(row, w, k) for row, w in zip(rows, weights, strict=True)]


# One block of 16 values, its edges, an odd number of blocks, several levels of the table.
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 32, 33, 127, 256, 300])
@pytest.mark.parametrize("weighted", [False, True])
def test_exact_is_within_1e_6_of_a_float64_dynamic_program(length, weighted, isa):
    rows = mixed(length)
    weights = make_weights(len(rows), length) if weighted else np.ones_like(rows)
    for k in (1, 2, 3, 16):
        centroids, codes, inertia = solve(rows, weights, k, isa=isa)
        assert (np.diff(centroids, axis=1) >= 0).all()
        distance = np.abs(rows[:, :, None] - centroids[:, None, :])
        np.testing.assert_array_equal(codes, distance.argmin(-1))
        expected = np.sum(weights * distance.min(-1).astype(np.float64) ** 2, axis=1)
        np.testing.assert_allclose(inertia, expected, rtol=1e-6)
        for row, w, code, least in zip(rows, weights, codes, least_errors(length, weighted, k), strict=True):
            assert partition_error(row, w, code) <= least * (1 + 1e-6)


@functools.cache
def least_error_of_a_long_row(length: int, k: int) -> float:
    return least_error(make_rows("student", 1, length)[0], make_weights(1, length)[0], k)


@pytest.mark.parametrize("length, k", [(1500, 16), (600, 256)])
def test_long_rows_and_many_clusters(length, k, isa):
    rows, weights = make_rows("student", 1, length), make_weights(1, length)
    codes = solve(rows, weights, k, isa=isa)[1]
    assert partition_error(rows[0], weights[0], codes[0]) <= least_error_of_a_long_row(length, k) * (1 + 1e-6)


def test_instruction_sets_agree(isa):
    rows, weights = mixed(LENGTH), make_weights(len(ROWS), LENGTH)
    for solver, init in METHODS:
        best = solve(rows, weights, 16, solver, init)
        for mine, theirs in zip(solve(rows, weights, 16, solver, init, isa), best, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-6)


@pytest.mark.parametrize("solver, init", METHODS)
def test_threads_and_company_change_no_bit(solver, init, isa, one_thread, library):
    rows, weights = np.tile(mixed(LENGTH), (5, 1)), make_weights(5 * len(ROWS), LENGTH)
    alone = solve(rows, weights, 16, solver, init, isa)
    library.any4_cpu_limit_threads(2)
    same(alone, solve(rows, weights, 16, solver, init, isa))
    one = solve(rows[7:8], weights[7:8], 16, solver, init, isa)
    same(one, tuple(a[7:8] for a in alone))


def test_an_empty_batch(library):
    centroids, codes, inertia = solve(np.zeros((0, 5)))
    assert centroids.shape == (0, 16) and codes.shape == (0, 5) and inertia.shape == (0,)


@pytest.mark.parametrize("shape", [None, (LENGTH,), (4, LENGTH), (3, 1, LENGTH), (3, 4, LENGTH)])
def test_vmap_stays_one_call(shape, library):
    rows = make_rows("normal", 12, LENGTH).reshape(3, 4, LENGTH)
    weights = None if shape is None else make_weights(1, int(np.prod(shape))).reshape(shape)
    # Of three axes, the first is mapped; a middle axis of 1 stands for weights [K] that are mapped.
    mapped = shape is not None and len(shape) == 3
    if mapped and shape[1] == 1:
        weights = weights[:, 0]
    batched = jax.jit(jax.vmap(lambda r, w: kmeans.exact(r, w, k=16), in_axes=(0, 0 if mapped else None)))
    assert batched.lower(rows, weights).as_text().count("@any4_cpu_kmeans") == 1
    found = tuple(np.asarray(a) for a in batched(rows, weights))
    for index in range(3):
        expected = solve(rows[index], weights[index] if mapped else weights)
        same(tuple(a[index] for a in found), expected)


def test_vmap_over_a_tolerance(library):
    rows, numbers = make_rows("normal", 4, LENGTH), inits.numbers("quantile", LENGTH, 16, 0)
    tolerances = np.array([1e9, 0], np.float32)
    call = jax.vmap(lambda t: kmeans.lloyd(rows, None, numbers, t, k=16, start="quantile", max_iter=300)[2])
    coarse, fine = np.asarray(call(tolerances))
    assert (fine < coarse).all()


def test_the_platform_decides_where_the_program_is_lowered(library):
    traced = jax.jit(lambda rows: kmeans_1d(rows, 4).codes).trace(jax.ShapeDtypeStruct((2, 8), jnp.float32))
    assert "any4_cpu_kmeans" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "any4_cpu_kmeans" not in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_rows_at_hand_take_the_backend_of_their_device(library):
    rows = make_rows("normal", 3, LENGTH)
    assert backends.BACKENDS.choose(None, "exact", arrays=(jnp.asarray(rows), None)) == "cpu"
    same(jax.tree.leaves(kmeans_1d(rows, 16)), solve(rows))


def test_without_a_library(monkeypatch):
    monkeypatch.setattr(registration, "_register", lambda kind: f"no {kind} library is built")
    rows = np.ones((2, 4), np.float32)
    assert backends.BACKENDS.choose(None, "exact", arrays=(rows,)) == "xla"
    # Of a shape of its own: what was traced with a library stays as it was.
    lowered = jax.jit(lambda r: kmeans_1d(r, 3).codes).lower(jax.ShapeDtypeStruct((2, 7), jnp.float32))
    assert "any4_cpu_kmeans" not in lowered.as_text()
    with pytest.raises(ValueError, match="no cpu library is built"):
        kmeans_1d(rows, 2, backend="cpu")
    with pytest.raises(RuntimeError, match="no cpu library is built"):
        kmeans.exact(rows, None, k=2)


def test_a_backend_that_runs_elsewhere_is_refused():
    assert backends.BACKENDS.named("cpu").supports("exact", "cuda") == "it runs on cpu, not on cuda"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"isa": "sse9"}, "isa=sse9"),
        ({"weights": np.ones(3, np.float32)}, "shapes"),
        ({"k": 257}, "shapes"),
    ],
)
def test_the_handler_refuses(change, words, library):
    call = {"weights": None, "k": 2} | change
    with pytest.raises(Exception, match=words):
        jax.block_until_ready(kmeans.exact(np.ones((2, 4), np.float32), call.pop("weights"), **call))
