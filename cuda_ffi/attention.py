"""Attention of one new token a row, which also writes its key and value to the cache, over plain arrays.

Letters: B rows, H query heads, Hkv key and value heads, D head size, S slots.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import registration
from cuda_ffi.dtypes import why_not as dtypes_why_not

TARGET = "any4_cuda_attention"
MOST_PARTS = 16
"""As in csrc/cuda/attention.h."""
MOST_SIZE = 256
MOST_SHARED = 16
"""The most query heads on one key head. The kernel reads the cache once for every eight of them."""

MOST_PAIRS = 65535
"""The most rows times key heads, a limit of a grid."""
MOST_SLOTS = 2**30 - 1
"""The most slots, for which offsets within a row of the cache fit in int32."""


def why_not(rows: int, heads: int, groups: int, size: int, slots: int, *dtypes: jax.typing.DTypeLike) -> str | None:
    """None if the kernel takes B = `rows`, H = `heads`, Hkv = `groups`, D = `size`, S = `slots` and arrays of these
    dtypes, the queries' first; else the reason in words."""
    reason = dtypes_why_not(("bfloat16", "float16"), *dtypes)
    if reason is not None:
        return reason
    if size % 16 or not 0 < size <= MOST_SIZE:
        return f"a head has {size} channels, which is no multiple of 16 up to {MOST_SIZE}"
    if heads > MOST_SHARED * groups:
        return f"{heads // groups} query heads share a key head, more than {MOST_SHARED}"
    if slots % 8:
        return f"the cache has {slots} slots, which is no multiple of 8"
    if rows * groups > MOST_PAIRS:
        return f"{rows} rows of {groups} key heads are {rows * groups} pairs, more than {MOST_PAIRS}"
    if slots > MOST_SLOTS:
        return f"the cache has {slots} slots, more than {MOST_SLOTS}"
    return None


def attend(
    queries: jax.Array,
    new_keys: jax.Array,
    new_values: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    length: jax.Array,
    positions: jax.Array,
    start: jax.Array,
    factors: tuple[jax.Array, jax.Array] | None,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Writes the new keys and values to slot positions + start, and attends from slot start to that one.

    Where the program gives the cache away, it is changed in place. There is no rule for vmap and no gradient.

    Args:
      queries: [B, H, D], bfloat16 or float16 like all arrays without another dtype.
      new_keys, new_values: [B, Hkv, D].
      keys: [B * Hkv, D, S].
      values: [B * Hkv, S, D].
      length: int32 scalar, the slots in use. It isn't read: it must be positions + start, which is alike in all rows.
        Its memory is the result's.
      positions, start: int32 [B]. A slot beyond the last stands for the last.
      factors: (cos, sin), float32 [B, D/2], by which queries and new keys are rotated first, in float32, with one
        rounding to their dtype: the channel pair (a, b) = (i, i + D/2) becomes (a cos_i - b sin_i, b cos_i + a sin_i).
        None: they are not rotated.
      scale, softcap, window: a score is softcap * tanh(scale * q @ k / softcap) or, without a softcap, scale * q @ k;
        with a window, a query sees the last `window` slots up to its own.

    Returns:
      (mixed [B, H, D], keys, values, length + 1). All is computed in float32. A row that sees no slot gets zeros.

    Raises:
      RuntimeError: the library can't be used; `registration.why_not("cuda")` says why without raising.
    """
    registration.register("cuda")
    rows, heads, size = queries.shape
    cos, sin = (jnp.zeros((0, 0), jnp.float32),) * 2 if factors is None else factors
    outputs = [
        *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (queries, keys, values, length)),
        jax.ShapeDtypeStruct((rows, heads, MOST_PARTS, size + 2), jnp.float32),
    ]
    attributes = {
        "scale": np.float32(scale),
        "softcap": np.float32(softcap or 0),
        "window": np.int64(window or 0),
    }
    # Keys, values and length, the operands 3 to 5, give their memory to the results 1 to 3.
    call = jax.ffi.ffi_call(TARGET, outputs, input_output_aliases={3: 1, 4: 2, 5: 3})
    operands = (queries, new_keys, new_values, keys, values, length, positions, start, cos, sin)
    mixed, keys, values, length, _ = call(*operands, **attributes)
    return mixed, keys, values, length
