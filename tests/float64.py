"""Stored weights in float64, what the kernels' contracts are measured against."""

import dataclasses

import numpy as np

from any4_jax.weights import QuantizedTensor


@dataclasses.dataclass(frozen=True)
class Terms:
    """W = scaled + shift, each [N, K], and what `scaled` was made of.

    Attributes:
      table: [N, 2**bits].
      scales: [N, K], each group's for its weights.
      scaled: table entries times scales.
      shift: the offsets, zeros where there are none.
    """

    table: np.ndarray
    scales: np.ndarray
    scaled: np.ndarray
    shift: np.ndarray

    @classmethod
    def of(cls, w: QuantizedTensor) -> "Terms":
        codes = np.asarray(w.unpacked_codes())
        table = np.broadcast_to(np.asarray(w.lut, np.float64), (codes.shape[0], w.lut.shape[1]))
        group = np.arange(codes.shape[1]) // w.group_size
        stored = np.asarray(w.scales)
        wide = np.exp2(stored.astype(np.float64) - 127) if stored.dtype == np.uint8 else stored.astype(np.float64)
        scales = wide[:, group]
        scaled = np.take_along_axis(table, codes.astype(np.int64), 1) * scales
        shift = np.zeros_like(scaled) if w.offsets is None else np.asarray(w.offsets, np.float64)[:, group]
        return cls(table, scales, scaled, shift)
