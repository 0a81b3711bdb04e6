"""Rows and weights for tests of k-means, and the errors of their partitions in float64."""

import jax
import numpy as np

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
