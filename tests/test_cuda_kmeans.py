"""The CUDA solver: on a GPU against float64, elsewhere lowering and words.

What every backend must do, tests/test_clustering.py asks of this one too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kmeans_rows import ROWS, least_error, make_rows, make_weights, partition_error, same

from any4_jax.clustering import backends, kmeans_1d
from cuda_ffi import kmeans_cuda, registration
from cuda_ffi.kmeans_cuda import TARGET, exact

why_not = registration.why_not("cuda")
native = pytest.mark.skipif(why_not is not None, reason=str(why_not))
gpu = pytest.mark.skipif(jax.default_backend() != "gpu" or why_not is not None, reason="needs an NVIDIA GPU")


def solve(rows, weights=None, k: int = 16) -> tuple[np.ndarray, ...]:
    found = exact(jnp.asarray(rows, jnp.float32), None if weights is None else jnp.asarray(weights), k=k)
    return tuple(np.asarray(a) for a in found)


def mixed(length: int) -> np.ndarray:
    return np.concatenate([make_rows(kind, 1, length, seed=length) for kind in ROWS])


# One block of 32 values, its edges, odd numbers of blocks, fewer and more of them than warps.
@gpu
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 65, 127, 300, 512, 550, 1000])
@pytest.mark.parametrize("weighted", [False, True])
def test_exact_is_within_1e_6_of_a_float64_dynamic_program(length: int, weighted: bool) -> None:
    rows = mixed(length)
    weights = make_weights(len(rows), length) if weighted else np.ones_like(rows)
    for k in (1, 2, 3, 16):
        centroids, codes, inertia = solve(rows, weights, k)
        assert (np.diff(centroids, axis=1) >= 0).all()
        distance = np.abs(rows[:, :, None] - centroids[:, None, :])
        np.testing.assert_array_equal(codes, distance.argmin(-1))
        expected = np.sum(weights * distance.min(-1).astype(np.float64) ** 2, axis=1)
        np.testing.assert_allclose(inertia, expected, rtol=1e-6)
        for row, w, code in zip(rows, weights, codes, strict=True):
            assert partition_error(row, w, code) <= least_error(row, w, k) * (1 + 1e-6)


# Of 5000 values more are sorted than shared memory holds.
@gpu
@pytest.mark.parametrize(("length", "k"), [(1500, 16), (600, 256), (5000, 16)])
def test_long_rows_and_many_clusters(length: int, k: int) -> None:
    rows, weights = make_rows("student", 1, length), make_weights(1, length)
    codes = solve(rows, weights, k)[1]
    assert partition_error(rows[0], weights[0], codes[0]) <= least_error(rows[0], weights[0], k) * (1 + 1e-6)


@gpu
@pytest.mark.parametrize("length", [4096, 14336, 40000])
def test_long_rows_agree_with_xla(length: int) -> None:
    rows, weights = make_rows("student", 2, length), make_weights(1, length)[0]
    theirs = kmeans_1d(rows, 16, sample_weight=weights, backend="xla")
    centroids, codes, inertia = solve(rows, weights)
    np.testing.assert_allclose(inertia, theirs.inertia, rtol=2e-6)
    # Of near-equal clusterings either may be taken, which moves a few values from one cluster to the next.
    np.testing.assert_allclose(centroids, theirs.centroids, rtol=1e-3, atol=1e-3)
    assert (codes == np.asarray(theirs.codes)).mean() > 0.999


@gpu
def test_company_and_order_change_no_bit() -> None:
    """More rows than are solved at a time, each some hundred times."""
    rows, weights = np.tile(mixed(160), (120, 1)), np.tile(make_weights(len(ROWS), 160), (120, 1))
    whole = solve(rows, weights)
    alone = solve(rows[: len(ROWS)], weights[: len(ROWS)])
    same(whole, tuple(np.tile(a, (120, *[1] * (a.ndim - 1))) for a in alone))
    order = np.random.default_rng(0).permutation(160)
    turned = solve(rows[:8, order], weights[:8, order])
    same((turned[0], turned[1]), (alone[0], alone[1][:, order]))


@gpu
def test_everything_is_written() -> None:
    """The memory that results get was full of NaN a moment ago."""
    rows = make_rows("normal", 600, 300)
    run = jax.jit(lambda rows: exact(rows, None, k=16))
    first = jax.tree.map(np.asarray, run(rows))
    jnp.full((600, 300), jnp.nan).block_until_ready()
    jnp.full((600, 16), jnp.nan).block_until_ready()
    same(first, run(rows))
    assert np.isfinite(first[0]).all() and (first[1] < 16).all()


@gpu
def test_an_empty_batch() -> None:
    centroids, codes, inertia = solve(np.zeros((0, 5)))
    assert centroids.shape == (0, 16) and codes.shape == (0, 5) and inertia.shape == (0,)


@gpu
@pytest.mark.parametrize(("change", "words"), [({"weights": np.ones(3, np.float32)}, "shapes"), ({"k": 257}, "shapes")])
def test_the_handler_refuses(change, words) -> None:
    call = {"weights": None, "k": 2} | change
    with pytest.raises(Exception, match=words):
        jax.block_until_ready(solve(np.ones((2, 4), np.float32), **call))


def lowered(function, *arguments) -> str:
    """StableHLO for an NVIDIA GPU, which this machine needn't have."""
    checks = [jax.export.DisabledSafetyCheck.custom_call(TARGET)]
    return jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(*arguments).mlir_module()


ROWS_OF = jax.ShapeDtypeStruct((6, 160), jnp.float32)


@native
def test_the_exact_solver_is_lowered_to_one_call_and_lloyd_to_none() -> None:
    assert lowered(lambda r: kmeans_1d(r, 16).codes, ROWS_OF).count(f"@{TARGET}(") == 1
    assert TARGET not in lowered(lambda r: kmeans_1d(r, 16, solver="lloyd").codes, ROWS_OF)


@native
@pytest.mark.parametrize("shape", [None, (160,), (4, 160), (3, 4, 160)])
def test_vmap_stays_one_call(shape) -> None:
    weights = None if shape is None else jax.ShapeDtypeStruct(shape, jnp.float32)
    rows = jax.ShapeDtypeStruct((3, 4, 160), jnp.float32)
    mapped = 0 if shape is not None and len(shape) == 3 else None
    text = lowered(jax.vmap(lambda r, w: exact(r, w, k=16), in_axes=(0, mapped)), rows, weights)
    assert text.count(f"@{TARGET}(") == 1 and "tensor<12x160xf32>" in text


@pytest.mark.parametrize(
    ("platform", "solver", "words"),
    [
        ("cpu", "exact", "it runs on cuda, not on cpu"),
        ("rocm", "exact", "it runs on cuda, not on rocm"),
        ("cuda", "lloyd", "it has only the exact solver"),
    ],
)
def test_what_it_declines_it_says(platform: str, solver: str, words: str) -> None:
    reason = backends.BACKENDS.named("cuda").supports(solver, platform)
    assert reason is not None and words in reason


def test_without_the_library_rows_on_a_gpu_take_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_register", lambda kind: f"no {kind} library is built")
    assert backends.BACKENDS.named("cuda").supports("exact", "cuda") == "no cuda library is built"
    assert backends.BACKENDS.first("exact", platform="cuda").name == "xla"
    with pytest.raises(RuntimeError, match="no cuda library is built"):
        kmeans_cuda.exact(jnp.ones((2, 4)), None, k=2)
