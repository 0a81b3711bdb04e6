"""A coded matrix with a few entries beside it, which kernels read as one weight (SpQR, arXiv 2306.03078)."""

from any4_jax.weights.quantized_tensor import QuantizedTensor
from any4_jax.weights.slice import Slice, leaf_of
from any4_jax.weights.sparse import Sparse
from any4_jax.weights.sum import Sum


def with_outliers(w: object) -> tuple[QuantizedTensor | Slice, Sparse] | None:
    """The coded matrix and the entries beside it of a Sum of these two; None for any other weight."""
    if not isinstance(w, Sum) or len(w.terms) != 2:
        return None
    coded, entries = w.terms
    return (coded, entries) if leaf_of(coded) is not None and isinstance(entries, Sparse) else None
