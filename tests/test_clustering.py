"""Clustering: optimality against float64 and scikit-learn, bit-exact invariances, degenerate rows."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kmeans_rows import METHODS, ROWS, least_error, make_rows, make_weights, partition_error, same

from any4_jax.choice import default_platform
from any4_jax.clustering import backends, kmeans_1d


@pytest.fixture(params=[option.name for option in backends.BACKENDS.options])
def backend(request) -> str:
    """Each of the solver's backends that works here."""
    reason = backends.BACKENDS.named(request.param).supports("exact", default_platform())
    if reason is not None:
        pytest.skip(reason)
    return request.param


# Compiling takes most of this file's time: nearly all tests solve 8 weighted rows of 160 values with two programs a
# solver, one for all rows at once and one row by row.
R, K = 8, 160
TOL = np.float32(1e-4)
ones = np.ones((R, K), np.float32)


@functools.cache
def mixed() -> np.ndarray:
    return np.concatenate([make_rows(kind, 1, K, seed=5) for kind in ROWS])


def solve(rows, weights=ones, solver="exact", init=None, chunk_rows=R, **options):
    reason = backends.BACKENDS.named(options.get("backend", "xla")).supports(solver, default_platform())
    if reason is not None:
        pytest.skip(reason)
    result = kmeans_1d(rows, 16, sample_weight=weights, solver=solver, init=init, chunk_rows=chunk_rows, **options)
    return jax.tree.map(np.asarray, result)


@pytest.mark.parametrize("weighted", [False, True])
def test_exact_is_within_1e_6_of_a_float64_dynamic_program(weighted, backend):
    weights = make_weights(R, K) if weighted else ones
    for seed in range(3):
        rows = np.concatenate([make_rows(kind, 1, K, seed) for kind in ROWS])
        result = solve(rows, weights, backend=backend)
        for kind, row, w, codes, inertia in zip(ROWS, rows, weights, result.codes, result.inertia, strict=True):
            best = least_error(row, w, 16)
            assert partition_error(row, w, codes) <= best * (1 + 1e-6)
            # A float32 centroid cannot say where a cluster 1e-6 wide lies, nor one of width 0.03 at 1000.
            if kind not in ("tight", "offset"):
                assert inertia == pytest.approx(best, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("length", [173, pytest.param(1100, marks=pytest.mark.slow)])
def test_exact_holds_where_the_last_block_is_padded(length, backend):
    rows, weights = make_rows("student", 2, length), make_weights(2, length)
    codes = np.asarray(kmeans_1d(rows, 16, sample_weight=weights, backend=backend).codes)
    for row, w, code in zip(rows, weights, codes, strict=True):
        assert partition_error(row, w, code) <= least_error(row, w, 16) * (1 + 1e-6)


@pytest.mark.parametrize("length, k", [(1, 1), (9, 4)])
def test_exact_equals_brute_force(length, k, backend):
    rng = np.random.default_rng(length)
    rows = rng.standard_normal((4, length)).astype(np.float32)
    weights = rng.uniform(0.1, 2, rows.shape).astype(np.float32)
    inertia = np.asarray(kmeans_1d(rows, k, sample_weight=weights, backend=backend).inertia)
    for row, w, got in zip(rows, weights, inertia, strict=True):
        order = np.argsort(row)
        best = min(
            partition_error(row[order], w[order], np.searchsorted(cuts, np.arange(length), side="right"))
            for cuts in itertools.combinations_with_replacement(range(length + 1), k - 1)
        )
        assert got == pytest.approx(best, rel=1e-6, abs=1e-12)


@functools.cache
def of_scikit_learn(kind: str, weighted: bool) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """20 rows, their weights, and the errors that ten starts of scikit-learn's KMeans leave them."""
    cluster = pytest.importorskip("sklearn.cluster")
    threadpoolctl = pytest.importorskip("threadpoolctl")
    rows = make_rows(kind, 24, K, seed=7)[:20]
    weights = make_weights(20, K) if weighted else np.ones_like(rows)
    # Its threads only wait for each other on rows this short, ten times longer than they compute.
    with threadpoolctl.threadpool_limits(1):
        models = [cluster.KMeans(16, n_init=10, random_state=0) for _ in rows]
        labels = [
            model.fit(row[:, None].astype(np.float64), sample_weight=w).labels_
            for model, row, w in zip(models, rows, weights, strict=True)
        ]
    return rows, weights, [partition_error(*row) for row in zip(rows, weights, labels, strict=True)]


@pytest.mark.filterwarnings("ignore")  # scikit-learn warns of rows with fewer distinct values than clusters
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["normal", "student", "clustered", "ties", "constant"])
def test_exact_is_no_worse_than_scikit_learn_on_200_rows(kind, weighted, backend):
    rows, weights, theirs = of_scikit_learn(kind, weighted)
    for start in (0, 8, 12):  # the last eight overlap: another number of rows would be another program
        part = slice(start, start + R)
        codes = solve(rows[part], weights[part], backend=backend).codes
        for row, w, mine, their_error in zip(rows[part], weights[part], codes, theirs[part], strict=True):
            assert partition_error(row, w, mine) <= their_error * (1 + 1e-6)


@pytest.mark.parametrize("solver, init", METHODS)
def test_results_are_consistent(solver, init, backend):
    rows, weights = mixed(), make_weights(R, K)
    result = solve(rows, weights, solver, init, backend=backend)
    assert (result.centroids.dtype, result.codes.dtype, result.inertia.dtype) == (np.float32, np.uint8, np.float32)
    assert (np.diff(result.centroids, axis=1) >= 0).all()
    distance = np.abs(rows[:, :, None] - result.centroids[:, None, :])
    np.testing.assert_array_equal(result.codes, distance.argmin(-1))
    inertia = np.sum(weights * distance.min(-1).astype(np.float64) ** 2, axis=1)
    np.testing.assert_allclose(result.inertia, inertia, rtol=1e-6)
    best = solve(rows, weights, backend=backend)
    for row, w, mine, least in zip(rows, weights, result.codes, best.codes, strict=True):
        assert partition_error(row, w, least) <= partition_error(row, w, mine) * (1 + 1e-6)


@pytest.mark.parametrize("solver, init", METHODS)
def test_chunks_order_and_powers_of_two_change_no_bit(solver, init, backend):
    rows, weights = mixed(), make_weights(R, K)
    whole = solve(rows, weights, solver, init, backend=backend)
    same(whole, solve(rows, weights, solver, init, chunk_rows=1, backend=backend))
    order = np.random.default_rng(3).permutation(R)
    same(jax.tree.map(lambda a: a[order], whole), solve(rows[order], weights[order], solver, init, backend=backend))
    scaled = solve(rows * np.float32(2.0**-20), weights, solver, init, backend=backend)
    same((scaled.codes, scaled.centroids * np.float32(2.0**20)), (whole.codes, whole.centroids))


def test_a_shared_weight_changes_no_bit(backend):
    rows, weights = mixed(), make_weights(1, K)[0]
    whole = solve(rows, np.tile(weights, (R, 1)), backend=backend)
    same(whole, solve(rows, weights, chunk_rows=4, backend=backend))


@pytest.mark.parametrize("solver, init", METHODS)
def test_degenerate_rows(solver, init, backend):
    few = np.tile(np.array([-1, -0.25, 0.5, 2], np.float32), K // 4)
    rows = np.stack([np.full(K, 0.3, np.float32), np.zeros(K, np.float32), few, -few[::-1]] * 2)
    result = solve(rows, ones, solver, init, backend=backend)
    np.testing.assert_array_equal(np.take_along_axis(result.centroids, result.codes.astype(int), 1), rows)
    np.testing.assert_array_equal(result.inertia, np.zeros(R))


def test_fewer_values_than_clusters(backend):
    result = solve(np.array([[3.0, -1.0, 2.0]], np.float32), None, backend=backend)
    assert np.isfinite(result.centroids).all() and result.inertia[0] == 0


@pytest.mark.parametrize("solver, init", METHODS)
def test_weights_of_zero(solver, init, backend):
    rows = make_rows("normal", R, K)
    weights = ones.copy()
    weights[:, ::2] = 0
    some = solve(rows, weights, solver, init, backend=backend)
    assert np.isfinite(some.centroids).all()
    if solver == "exact":
        for row, w, codes in zip(rows, weights, some.codes, strict=True):
            assert partition_error(row, w, codes) <= least_error(row[1::2], w[1::2], 16) * (1 + 1e-6)
    same(solve(rows, 0 * ones, solver, init, backend=backend), solve(rows, ones, solver, init, backend=backend))


def test_lloyd_refills_empty_clusters(backend):
    # Evenly spaced starts leave all clusters but two without values.
    rows = np.tile(np.append(np.linspace(0, 1, K - 1), 1e4).astype(np.float32), (R, 1))
    assert np.unique(solve(rows, ones, "lloyd", "int", backend=backend).codes[0]).size == 16


def test_lloyd_is_seeded_and_improves_on_its_start(backend):
    rows = make_rows("normal", R, K)
    first = solve(rows, ones, "lloyd", "kmeans++", seed=1, backend=backend)
    same(first, solve(rows, ones, "lloyd", None, seed=1, backend=backend))
    assert (first.centroids != solve(rows, ones, "lloyd", "kmeans++", seed=2, backend=backend).centroids).any()
    # A tolerance this large stops after one step.
    one, many = (solve(rows, ones, "lloyd", "int", tol=tol, backend=backend) for tol in (1e9, 1e-4))
    assert many.inertia.mean() < one.inertia.mean()


@pytest.mark.parametrize("solver, init", METHODS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("backend", [option.name for option in backends.BACKENDS.options[:-1]], indirect=True)
def test_backends_agree(solver, init, weighted, backend):
    rows, weights = mixed(), make_weights(R, K) if weighted else ones
    truth, found = (
        solve(rows, weights, solver, init, backend="xla"),
        solve(rows, weights, solver, init, backend=backend),
    )
    for kind, theirs, mine in zip(ROWS, truth.codes, found.codes, strict=True):
        # Rows of ties have more than one optimum, and where an outlier sets the scale float32 can't tell some apart.
        if kind not in ("ties", "outlier", "constant"):
            np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_allclose(found.inertia, truth.inertia, rtol=1e-6, atol=1e-12)


def test_what_is_not_finite_spoils_its_own_row_alone(backend):
    rows, weights = make_rows("normal", R, K), make_weights(R, K)
    rows[1, 3], rows[2, 3], weights[3, 3], weights[4, 3] = np.nan, np.inf, np.nan, np.inf
    # Not through kmeans_1d, which refuses such values unless they are traced.
    options = backends.Options(k=16, solver="exact", init="", max_iter=0, chunk_rows=R)
    centroids, codes, inertia = map(
        np.asarray, backends.solve(rows, weights, TOL, None, options=options, backend=backend)
    )
    for row in range(R):
        spoilt = row in (1, 2, 4)
        assert np.isnan(centroids[row]).all() == np.isnan(inertia[row]) == spoilt
        assert not spoilt or not codes[row].any()
    unweighted = solve(np.tile(rows[3], (R, 1)), ones, backend=backend)
    np.testing.assert_array_equal(codes[3], unweighted.codes[0])


def test_low_precision_and_tracing(backend):
    rows = jnp.asarray(mixed(), jnp.bfloat16)
    traced = jax.jit(lambda r, w: kmeans_1d(r, 16, sample_weight=w, chunk_rows=R, backend=backend))(rows, ones)
    same(traced, solve(np.asarray(rows).astype(np.float32), backend=backend))


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
        ({"backend": "best"}, ValueError, "'cuda', 'cpu', 'xla'"),
    ],
)
def test_refusals(change, error, words):
    call = {"rows": np.ones((2, 4), np.float32), "k": 2} | change
    with pytest.raises(error, match=words):
        kmeans_1d(call.pop("rows"), call.pop("k"), **call)
