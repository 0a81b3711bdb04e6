"""SpQR as its paper has it (arXiv 2306.03078), one column at a time, in float64 numpy."""

from __future__ import annotations

import numpy as np
from gptq_float64 import gptq


def integers(values: np.ndarray, bits: int, over: np.ndarray | None = None) -> np.ndarray:
    """Values [..., G] on integers with a real zero, scaled by the extremes of `over` [..., G'] (of themselves)."""
    over = values if over is None else over
    low, most = over.min(axis=-1, keepdims=True), 2**bits - 1
    step = np.where(np.ptp(over, axis=-1, keepdims=True) == 0, 1, np.ptp(over, axis=-1, keepdims=True) / most)
    return low + step * np.clip(np.round((values - low) / step), 0, most)


def without_outliers(group: np.ndarray, cost: np.ndarray, limit: float, bits: int) -> np.ndarray:
    """A group [N, G] with likely outliers replaced by the mean of the others: leave one out."""
    lost = np.square(integers(group, bits) - group) * cost
    likely = np.zeros(group.shape, bool)
    for i in range(group.shape[1]):
        rest = np.delete(np.arange(group.shape[1]), i)
        left = np.square(integers(group[:, rest], bits) - group[:, rest]) * cost[rest]
        likely[:, i] = lost.sum(axis=1) - left.sum(axis=1) > limit
    mean = np.where(likely, 0, group).sum(axis=1) / np.maximum((~likely).sum(axis=1), 1)
    return np.where(likely, mean[:, None], group)


def coded(values: np.ndarray, bits: int | None, rows: int) -> np.ndarray:
    """Values [N] on integers of `bits`, each run of rows scaled by its extremes."""
    if bits is None:
        return values
    return np.concatenate([integers(values[i : i + rows], bits) for i in range(0, len(values), rows)])


def spqr(w, hessian, *, bits, group_size, threshold, scale_bits, offset_bits, rows, order, damping):
    """(codes [N, K], quantized weights [N, K], loss), as of `gptq`."""
    h = hessian[np.ix_(order, order)] + damping * np.diagonal(hessian).mean() * np.eye(len(order))
    cost = 1 / np.square(np.diagonal(np.linalg.cholesky(np.linalg.inv(h)).T))
    limit = threshold * (w[:, order].astype(np.float64).var(axis=0, ddof=1) * cost).mean()
    ramp, now = np.arange(2**bits) - (2**bits - 1) / 2, {}

    def arrive(step: int, live: np.ndarray) -> None:
        if step % group_size == 0:
            mine = slice(step, step + group_size)
            group = without_outliers(live[:, mine], cost[mine], limit, bits)
            scale = coded(np.ptp(group, axis=1) / (2**bits - 1), scale_bits, rows)
            # The level in the middle of the table of integers from -2^(b-1) is at -1/2.
            middle = (group.min(axis=1) + group.max(axis=1)) / 2
            offset = coded(middle + scale / 2, offset_bits, rows)
            now["levels"] = ramp * scale[:, None] + (offset - scale / 2)[:, None]

    return gptq(
        *(w, hessian, lambda step: now["levels"]), order=order, damping=damping, arrive=arrive, limits=limit / cost
    )
