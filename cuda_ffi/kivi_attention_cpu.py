"""Attention of one new token a row over a KIVI cache that holds it already, on a CPU, over plain arrays.

Letters: B rows, H query heads, Hkv key and value heads, D head size, G numbers in a group, R exact tokens, P positions.
"""

import jax
import numpy as np

from cuda_ffi import registration
from cuda_ffi.dtypes import why_not as dtypes_why_not
from cuda_ffi.kivi_attention import Held

TARGET = "any4_cpu_kivi_attention"
SIZES = (32, 64, 128, 256)
GROUP_UNIT = 16
"""Groups are multiples of it: the tokens or channels whose codes of 2 bits fill a word."""


def why_not(group_size: int, held: Held, *dtypes: jax.typing.DTypeLike) -> str | None:
    """None if the kernel takes G = `group_size`, this cache and arrays of these dtypes; else the reason in words."""
    size = held.keys.shape[-1]
    reason = dtypes_why_not(("float32", "bfloat16"), *dtypes, held.keys.dtype)
    if reason is not None:
        return reason
    if size not in SIZES:
        return f"a head has {size} channels, not {', '.join(map(str, SIZES[:-1]))} or {SIZES[-1]}"
    if group_size % GROUP_UNIT:
        return f"{group_size} numbers share a step, which is no multiple of {GROUP_UNIT}"
    if group_size < size and size % group_size:
        return f"{group_size} numbers share a step, which doesn't divide the {size} channels of a head"
    return None


def attend(
    queries: jax.Array,
    held: Held,
    positions: jax.Array,
    *,
    group_size: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    isa: str = "auto",
) -> jax.Array:
    """Attends from position 0 of each row to the new token's.

    Of n tokens of a row, the new one's included, n mod R keys, or R if that is 0, and the newest R values are read from
    the rings. Numbers of codes aren't rounded. Results don't depend on the number of threads. There is no rule for vmap
    and no gradient.

    Args:
      queries: [B, H, D], float32 or bfloat16 like the cache; keys are as they are to be multiplied.
      held: the cache with the new tokens; its length isn't read. P are multiples of 16.
      positions: int32 [B], of the new tokens. A row whose position is negative gets zeros.
      group_size: G, a multiple of 16 that divides D, or is at least D.
      scale, softcap, window: as for `cuda_ffi.attention.attend`.
      isa: the instruction set: "avx512", "avx2", "portable", or "auto" for the best that this processor has.

    Returns:
      [B, H, D]. All is computed in float32.

    Raises:
      RuntimeError: the library can't be used; `registration.why_not("cpu")` says why without raising.
    """
    registration.register("cpu")
    attributes = {
        "scale": np.float32(scale),
        "softcap": np.float32(softcap or 0),
        "window": np.int64(window or 0),
        "group_size": np.int64(group_size),
        "isa": isa,
    }
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(queries.shape, queries.dtype))
    return call(queries, *held[:-1], positions, **attributes)
