"""The refit of table-coded rows to their stored dtypes, over plain arrays."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import registration

TARGETS = {"cpu": "any4_cpu_refit", "cuda": "any4_cuda_refit"}


class Search(NamedTuple):
    """The search for a group's scale.

    starts: (factor, held) pairs. The factor multiplies the scale, and the point `held` of the table's range (0 is its
      lower end, 1 its upper) stays where it is; without offsets, zero stays.
    fits: how many least-squares fits follow each start, each with new codes.
    """

    starts: tuple[tuple[float, float], ...]
    fits: int


def refit(
    w: jax.Array,
    importance: jax.Array,
    lut: jax.Array,
    scales: jax.Array,
    offsets: jax.Array | None,
    *,
    kind: str,
    group_size: int,
    searches: int,
    max_rounds: int,
    free: tuple[int, int],
    settled: float,
    search: Search,
    isa: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(lut, scales, offsets) of lower or equal error sum_k h_k (w_k - lut[c_k] s_g(k) - o_g(k))^2 for each row.

    A round searches for each group's scale (the first rounds only), moves each free entry of the table to its weighted
    mean, fits each group's scale and offset, and keeps what lowers the error. A row's result depends on that row and
    the importance alone. Under vmap over rows it stays one call, with more rows; over importances it becomes a loop.

    Args:
      w: float32 [N, K].
      importance: h, float32 [K], not negative.
      lut: [N or 1, 2**bits], 4, 8 or 16 entries, ascending; float32, bfloat16, float16, or int8 from -127 to 127.
      scales: [N, ceil(K / group_size)], float32, bfloat16 or float16.
      offsets: like scales, or None.
      kind: which library, "cpu" or "cuda".
      group_size: G, 1 to K.
      searches: the number of rounds that begin with a search.
      max_rounds: the most rounds.
      free: (first, stop) of the table's entries that may change.
      settled: a row is left alone after a round that lowers its error by less than this share, unless a search follows.
      search: what a search tries.
      isa: the instruction set of the cpu kind: "avx512", "avx2", "portable", or "auto" for the best that this processor
        has.

    Returns:
      Arrays of the given shapes and dtypes; the table is the given one if no entry is free.

    Raises:
      RuntimeError: the library can't be used; `registration.why_not(kind)` says why without raising.
    """
    registration.register(kind)
    stored = (lut, scales) if offsets is None else (lut, scales, offsets)
    mantissas = tuple(_mantissa(a.dtype) for a in stored)
    call = _call(kind, group_size, searches, max_rounds, free, settled, search, mantissas, isa)
    tables = jnp.broadcast_to(lut, (w.shape[0], lut.shape[1]))
    # The handler's float32 values, in and out, are values that the stored dtypes hold: the casts round nothing.
    found = call(w, importance, *(a.astype(jnp.float32) for a in (tables, *stored[1:])))
    fit = tuple(a.astype(like.dtype) for a, like in zip(found, stored, strict=True))
    return fit[0] if free[0] < free[1] else lut, fit[1], None if offsets is None else fit[2]


def _mantissa(dtype) -> int:
    """The mantissa bits of a stored dtype: float32 23, float16 10, bfloat16 7; 0 for int8."""
    return jnp.finfo(dtype).nmant if jnp.issubdtype(dtype, jnp.floating) else 0


@functools.cache
def _call(
    kind: str,
    group_size: int,
    searches: int,
    max_rounds: int,
    free: tuple[int, int],
    settled: float,
    search: Search,
    mantissas: tuple[int, ...],
    isa: str,
):
    """The custom call on float32 (w, importance, lut [N, 2**bits], scales[, offsets]) with its rule for vmap.

    mantissas: those of the stored dtypes of lut, scales and offsets, see `_mantissa`.
    """
    attributes = {
        "group_size": np.int64(group_size),
        "searches": np.int64(searches),
        "max_rounds": np.int64(max_rounds),
        "first": np.int64(free[0]),
        "stop": np.int64(free[1]),
        "settled": np.float32(settled),
        "factors": np.asarray([factor for factor, _ in search.starts], np.float32),
        "held": np.asarray([held for _, held in search.starts], np.float32),
        "fits": np.int64(search.fits),
        "mantissas": np.asarray((*mantissas, 23)[:3], np.int64),
    } | ({"isa": isa} if kind == "cpu" else {})

    @jax.custom_batching.custom_vmap
    def call(w, importance, *fit):
        # An array of no elements stands for absent offsets, as operand and as result.
        given = fit if len(fit) == 3 else (*fit, jnp.zeros((0, 0), jnp.float32))
        outputs = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in given]
        return tuple(jax.ffi.ffi_call(TARGETS[kind], outputs)(w, importance, *given, **attributes)[: len(fit)])

    @call.def_vmap
    def _rule(axis_size, batched, w, importance, *fit):
        operands = [
            a if b else jnp.broadcast_to(a, (axis_size, *a.shape))
            for a, b in zip((w, importance, *fit), batched, strict=True)
        ]
        whole = (True,) * len(fit)
        if batched[1]:
            return jax.lax.map(lambda one: call(*one), tuple(operands)), whole
        rows = [a.reshape(-1, a.shape[-1]) for a in (operands[0], *operands[2:])]
        found = call(rows[0], importance, *rows[1:])
        return tuple(a.reshape(axis_size, -1, a.shape[-1]) for a in found), whole

    return call
