"""GPTQ as its paper has it (arXiv 2210.17323, algorithm 1), one column at a time, in float64 numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def gptq(
    w: np.ndarray,
    hessian: np.ndarray,
    levels_of: Callable[[int], np.ndarray],
    *,
    order: np.ndarray,
    damping: float,
    arrive: Callable[[int, np.ndarray], None] = lambda step, live: None,
    limits: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, float]:
    """(codes [N, K], quantized weights [N, K], loss), by the upper Cholesky factor of the inverse Hessian.

    Args:
      w: [N, K]; none of the inputs is dead.
      hessian: [K, K].
      levels_of: the values [N, E] that the weights of a step may take, by the step in `order`.
      order: the columns in sequence.
      damping: as in `GPTQ`.
      arrive: called before each step with the weights [N, K] as compensated so far, columns in sequence.
      limits: for each step, the square of how far a weight may be from its level; one that is farther stays as it is.
    """
    live = w[:, order].astype(np.float64)
    h = hessian[np.ix_(order, order)].astype(np.float64)
    h[np.diag_indices_from(h)] += damping * np.diagonal(h).mean()
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    codes, found, loss = np.zeros(w.shape, int), np.zeros(w.shape), 0.0
    for step in range(w.shape[1]):
        arrive(step, live)
        levels = np.asarray(levels_of(step), np.float64)
        codes[:, step] = np.abs(levels - live[:, step, None]).argmin(axis=1)
        found[:, step] = levels[np.arange(len(w)), codes[:, step]]
        if limits is not None:
            far = np.square(found[:, step] - live[:, step]) > limits[step]
            found[:, step] = np.where(far, live[:, step], found[:, step])
        error = (live[:, step] - found[:, step]) / upper[step, step]
        loss += float(np.square(error).sum())
        live[:, step:] -= np.outer(error, upper[step, step:])
    back = np.argsort(order)
    return codes[:, back], found[:, back], loss
