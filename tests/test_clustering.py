"""Clustering: optimality against float64 and scikit-learn, bit-exact invariances, degenerate rows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax.clustering import kmeans_1d
from any4_jax.clustering.exact import plan

METHODS = [("exact", None)] + [("lloyd", i) for i in ("kmeans++", "random", "int", "nf4", "quantile")]
ROWS = ("normal", "student", "clustered", "ties", "offset", "outlier", "tight", "constant")


def make_rows(kind: str, count: int, length: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (count, length)
    normal = rng.standard_normal(shape)
    rows = {
        "normal": normal,
        "student": rng.standard_t(2, shape),
        "clustered": rng.integers(0, 12, shape) + 0.05 * normal,
        "ties": np.round(normal * 4) / 4,
        "offset": 1000 + normal,
        "outlier": np.where(np.arange(length) == length // 2, 1e6, normal),
        "tight": rng.integers(0, 16, shape) + 1e-6 * normal,
        "constant": np.full(shape, 0.3),
    }[kind]
    return rows.astype(np.float32)


def make_weights(count: int, length: int, seed: int = 1) -> np.ndarray:
    """Weights over eight decades."""
    return (10.0 ** np.random.default_rng(seed).uniform(-8, 0, (count, length))).astype(np.float32)


def least_error(x: np.ndarray, w: np.ndarray, k: int) -> float:
    """Optimal error by the O(k N^2) dynamic program in float64, interval errors by Welford's updates."""
    order = np.argsort(x, kind="stable")
    x, w = x[order].astype(np.float64), w[order].astype(np.float64)
    cost = np.full((len(x), len(x)), np.inf)
    weight, mean, error = np.zeros((3, len(x)))
    for j in range(len(x)):
        s = slice(0, j + 1)
        delta = x[j] - mean[s]
        share = w[j] / np.maximum(weight[s] + w[j], 1e-300)
        error[s] += weight[s] * share * delta**2
        mean[s] += delta * share
        weight[s] += w[j]
        cost[s, j] = error[s]
    best = cost[0]
    for _ in range(1, k):
        best = (np.append(0, best[:-1])[:, None] + cost).min(0)
    return best[-1]


def partition_error(x: np.ndarray, w: np.ndarray, codes: np.ndarray) -> float:
    """Error of a partition about its exact means, in float64."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    total = 0.0
    for code in np.unique(codes):
        part = codes == code
        if w[part].sum() > 0:
            offset = x[part] - x[part][0]
            total += np.sum(w[part] * (offset - np.average(offset, weights=w[part])) ** 2)
    return total


def same(a, b) -> None:
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ROWS)
def test_exact_is_within_1e_6_of_a_float64_dynamic_program(kind, weighted):
    rows = make_rows(kind, 3, 288)
    weights = make_weights(*rows.shape) if weighted else None
    used = np.ones_like(rows) if weights is None else weights
    result = kmeans_1d(rows, 16, sample_weight=weights)
    for row, w, codes in zip(rows, used, np.asarray(result.codes), strict=True):
        best = least_error(row, w, 16)
        # Rows of 1e-6 wide clusters: the partition is held to the bound, since a float32 centroid cannot be.
        assert partition_error(row, w, codes) <= best * (1 + 1e-6)


@pytest.mark.parametrize("length, k", [(1, 1), (2, 2), (5, 3), (7, 2), (9, 4), (17, 3)])
def test_exact_equals_brute_force(length, k):
    rng = np.random.default_rng(length)
    rows = rng.standard_normal((4, length)).astype(np.float32)
    weights = rng.uniform(0.1, 2, rows.shape).astype(np.float32)
    inertia = np.asarray(kmeans_1d(rows, k, sample_weight=weights).inertia)
    for row, w, got in zip(rows, weights, inertia, strict=True):
        order = np.argsort(row)
        best = min(
            partition_error(row[order], w[order], np.searchsorted(cuts, np.arange(length), side="right"))
            for cuts in itertools.combinations_with_replacement(range(length + 1), k - 1)
        )
        assert got == pytest.approx(best, rel=1e-6, abs=1e-12)


@pytest.mark.filterwarnings("ignore")  # scikit-learn warns of rows with fewer distinct values than clusters
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["normal", "student", "clustered", "ties", "constant"])
def test_exact_is_no_worse_than_scikit_learn(kind, weighted):
    cluster = pytest.importorskip("sklearn.cluster")
    rows = make_rows(kind, 20, 192, seed=7)
    weights = make_weights(*rows.shape) if weighted else np.ones_like(rows)
    codes = np.asarray(kmeans_1d(rows, 16, sample_weight=weights).codes)
    for row, w, mine in zip(rows, weights, codes, strict=True):
        model = cluster.KMeans(16, n_init=10, random_state=0)
        theirs = model.fit(row[:, None].astype(np.float64), sample_weight=w).labels_
        assert partition_error(row, w, mine) <= partition_error(row, w, theirs) * (1 + 1e-6)


@pytest.mark.parametrize("solver, init", METHODS)
def test_results_are_consistent(solver, init):
    rows = make_rows("student", 4, 150)
    weights = make_weights(*rows.shape)
    result = kmeans_1d(rows, 16, sample_weight=weights, solver=solver, init=init)
    centroids, codes = np.asarray(result.centroids), np.asarray(result.codes)
    assert (centroids.dtype, codes.dtype, result.inertia.dtype) == (np.float32, np.uint8, np.float32)
    assert (np.diff(centroids, axis=1) >= 0).all()
    distance = np.abs(rows[:, :, None] - centroids[:, None, :])
    np.testing.assert_array_equal(codes, distance.argmin(-1))
    inertia = np.sum(weights * distance.min(-1).astype(np.float64) ** 2, axis=1)
    np.testing.assert_allclose(result.inertia, inertia, rtol=1e-6)
    best = np.asarray(kmeans_1d(rows, 16, sample_weight=weights).inertia)
    assert (best <= inertia * (1 + 1e-6)).all()


@pytest.mark.parametrize(
    "solver, init, weight_shape",
    [
        ("exact", None, None),
        ("exact", None, "rows"),
        ("lloyd", "kmeans++", "shared"),
        ("lloyd", "quantile", None),
    ],
)
def test_chunks_order_and_powers_of_two_change_no_bit(solver, init, weight_shape):
    rows = make_rows("student", 6, 60)
    rows[4:] = make_rows("ties", 2, 60)
    weights = {None: None, "shared": make_weights(1, 60)[0], "rows": make_weights(6, 60)}[weight_shape]

    def solve(rows, weights=weights, chunk_rows=3):
        return kmeans_1d(rows, 16, sample_weight=weights, solver=solver, init=init, chunk_rows=chunk_rows)

    whole = solve(rows)
    same(whole, solve(rows, chunk_rows=1))
    same(whole, solve(rows, chunk_rows=6))
    order = np.random.default_rng(3).permutation(6)
    same(
        jax.tree.map(lambda a: np.asarray(a)[order], whole),
        solve(rows[order], weights[order] if weight_shape == "rows" else weights),
    )
    scaled = solve(rows * np.float32(2.0**-20))
    same((scaled.codes, scaled.centroids * 2.0**20), (whole.codes, whole.centroids))


@pytest.mark.parametrize("solver, init", METHODS)
def test_degenerate_rows(solver, init):
    few = np.tile(np.array([-1, -0.25, 0.5, 2], np.float32), 10)
    rows = np.stack([np.full(40, 0.3, np.float32), np.zeros(40, np.float32), few, -few[::-1]])
    result = kmeans_1d(rows, 16, solver=solver, init=init)
    restored = np.take_along_axis(np.asarray(result.centroids), np.asarray(result.codes).astype(int), 1)
    np.testing.assert_array_equal(restored, rows)
    np.testing.assert_array_equal(result.inertia, np.zeros(4))
    short = kmeans_1d(rows[2:, :3], 16, solver=solver, init=init)
    assert np.isfinite(short.centroids).all() and (np.asarray(short.inertia) == 0).all()


@pytest.mark.parametrize("solver, init", METHODS)
def test_weights_of_zero(solver, init):
    rows = make_rows("normal", 2, 120)
    weights = np.ones_like(rows)
    weights[:, ::2] = 0
    some = kmeans_1d(rows, 16, sample_weight=weights, solver=solver, init=init)
    assert np.isfinite(some.centroids).all()
    if solver == "exact":
        np.testing.assert_allclose(some.inertia, kmeans_1d(rows[:, 1::2], 16).inertia, rtol=1e-6)
    none = kmeans_1d(rows, 16, sample_weight=np.zeros_like(rows), solver=solver, init=init)
    same(none, kmeans_1d(rows, 16, sample_weight=np.ones_like(rows), solver=solver, init=init))


def test_lloyd_refills_empty_clusters():
    # Evenly spaced starts leave all clusters but two without values.
    rows = np.concatenate([np.linspace(0, 1, 63), [1e4]]).astype(np.float32)[None]
    result = kmeans_1d(rows, 16, solver="lloyd", init="int")
    assert np.unique(result.codes).size == 16


def test_lloyd_is_seeded_and_improves_on_its_start():
    rows = make_rows("normal", 4, 200)
    first = kmeans_1d(rows, 16, solver="lloyd", seed=1)
    same(first, kmeans_1d(rows, 16, solver="lloyd", seed=1))
    assert (np.asarray(first.centroids) != np.asarray(kmeans_1d(rows, 16, solver="lloyd", seed=2).centroids)).any()
    one = kmeans_1d(rows, 16, solver="lloyd", init="int", max_iter=1)
    many = kmeans_1d(rows, 16, solver="lloyd", init="int")
    assert (np.asarray(many.inertia) < np.asarray(one.inertia)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_and_tracing(dtype):
    rows = jnp.asarray(make_rows("normal", 3, 96), dtype)
    eager = kmeans_1d(rows, 8)
    same(eager, jax.jit(lambda r: kmeans_1d(r, 8))(rows))
    same(eager, kmeans_1d(rows.astype(jnp.float32), 8))


@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 576, 1536, 4096, 11008, 14336])
def test_stages_cover_the_row(length):
    stages = plan(length)
    assert stages[-1].size == 1 and all(2 <= s.parts <= 16 for s in stages)
    assert all(coarse.size == fine.parts * fine.size for coarse, fine in itertools.pairwise(stages))
    covered = stages[0].parts * stages[0].size
    assert length <= covered < length + max(stages[0].size, 2)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"rows": np.ones(4, np.float32)}, ValueError, "shape"),
        ({"rows": np.ones((2, 0), np.float32)}, ValueError, "K >= 1"),
        ({"rows": np.ones((2, 4), np.int32)}, TypeError, "int32"),
        ({"rows": np.array([[1, np.nan]], np.float32)}, ValueError, "NaN"),
        ({"rows": np.array([[1, np.inf]], np.float32)}, ValueError, "infinite"),
        ({"k": 0}, ValueError, "k is 0"),
        ({"k": 257}, ValueError, "257"),
        ({"sample_weight": np.ones(3, np.float32)}, ValueError, "sample_weight"),
        ({"sample_weight": np.full(4, -1, np.float32)}, ValueError, "negative"),
        ({"sample_weight": np.full(4, np.nan, np.float32)}, ValueError, "NaN"),
        ({"solver": "best"}, ValueError, "best"),
        ({"init": "random"}, ValueError, "exact"),
        ({"solver": "lloyd", "init": "best"}, ValueError, "best"),
        ({"solver": "lloyd", "init": "nf4", "k": 8}, ValueError, "nf4"),
        ({"max_iter": 0}, ValueError, "max_iter"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows"),
    ],
)
def test_refusals(change, error, words):
    call = {"rows": np.ones((2, 4), np.float32), "k": 2} | change
    with pytest.raises(error, match=words):
        kmeans_1d(call.pop("rows"), call.pop("k"), **call)
