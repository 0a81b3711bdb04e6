"""`refit`: lower the error of every row of a table-coded matrix."""

import jax

from any4_jax.refit.backends import BACKENDS, solve
from any4_jax.refit.xla import Fit, Options


def refit(
    w: jax.Array,
    importance: jax.Array,
    start: Fit,
    group_size: int,
    *,
    searches: int,
    max_rounds: int,
    entries: slice = slice(None),
    backend: str | None = None,
) -> Fit:
    """A fit of lower or equal error sum_k h_k (w_k - lut[c_k] s_g(k) - o_g(k))^2 for each row.

    A row's result depends on nothing but the row and the importance (and in "xla" the number of rows, by rounding);
    w * 2**n, with scales and offsets * 2**n, gives scales and offsets * 2**n exactly, where no stored dtype over- or
    underflows.

    Args:
      w: float32 [R, K].
      importance: h, float32 [K], not negative.
      start: what to improve; a table [1, 2**bits] that rows share must be left alone (entries=slice(0)).
      group_size: G, at most K.
      searches: rounds that begin with a search for each group's scale.
      max_rounds: rounds at most; they end before where all rows have settled.
      entries: those of the table that may change, a range without steps.
      backend: "cuda" (NVIDIA GPUs), "cpu" (C++) or "xla" (everywhere); None takes the first that works where the
        program runs. They differ by float32 rounding, which may choose another of scales that are as good.

    Raises:
      ValueError: there is no such backend, or it can't run here.
    """
    backend = BACKENDS.choose(backend, arrays=(w, importance, *start))
    first, stop, _ = entries.indices(start.lut.shape[1])
    options = Options(group_size, searches, max_rounds, first, max(first, stop))
    return solve(w, importance, start, options=options, backend=backend)
