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
    """Lowers the error sum_k h_k (w_k - lut[c_k] s_g(k) - o_g(k))^2 of each row, or leaves the row as it is.

    A row's result depends only on the row and the importance (in "xla" also on the number of rows, through rounding).
    If w, scales and offsets are multiplied by 2**n, the resulting scales and offsets are multiplied by 2**n exactly,
    as long as no stored dtype overflows or underflows.

    Args:
      w: float32 [R, K].
      importance: h, float32 [K], not negative.
      start: what to improve. A table [1, 2**bits] that rows share must be left alone (entries=slice(0)).
      group_size: G, at most K.
      searches: how many of the first rounds begin with a search for each group's scale.
      max_rounds: the most rounds; they end earlier if all rows have settled.
      entries: the table entries that may change, a slice without a step.
      backend: "cuda" (NVIDIA GPUs), "cpu" (C++) or "xla" (everywhere); None takes the first that works where the
        program runs. They differ by float32 rounding, which may pick a different one of equally good scales.

    Returns:
      A fit of the shapes and dtypes of `start`; a table that may change has one row for each row of w.

    Raises:
      ValueError: there is no such backend, or it can't run here.
    """
    backend = BACKENDS.choose(backend, arrays=(w, importance, *start))
    first, stop, _ = entries.indices(start.lut.shape[1])
    options = Options(group_size, searches, max_rounds, first, max(first, stop))
    return solve(w, importance, start, options=options, backend=backend)
