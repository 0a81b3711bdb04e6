"""Attention of new tokens, which also writes their keys and values to the cache, on a CPU, over plain arrays.

Letters: B rows, T new tokens of each, H query heads, Hkv key and value heads, D head size, S slots.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import registration
from cuda_ffi.dtypes import why_not as dtypes_why_not

TARGET = "any4_cpu_attention"
SIZE_UNIT = 16
MOST_SIZE = 256


def why_not(size: int, *dtypes: jax.typing.DTypeLike) -> str | None:
    """None if the kernel takes D = `size` and arrays of these dtypes, the queries' first; else the reason in words."""
    reason = dtypes_why_not(("float32", "bfloat16"), *dtypes)
    if reason is not None:
        return reason
    if size % SIZE_UNIT or not 0 < size <= MOST_SIZE:
        return f"a head has {size} channels, which is no multiple of {SIZE_UNIT} up to {MOST_SIZE}"
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
    isa: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Writes the new keys and values to the slots positions + start, and attends from slot start to each token's own.

    Where the program gives the cache away, it is changed in place. Results don't depend on the number of threads. There
    is no rule for vmap and no gradient.

    Args:
      queries: [B, T, H, D], all arrays but integers and factors float32, or all bfloat16.
      new_keys, new_values: [B, T, Hkv, D].
      keys, values: [B * Hkv, D, S] and [B * Hkv, S, D].
      length: as for `cuda_ffi.attention.attend`.
      positions: int32 [B, T], which follow one another. A token whose position is negative gets zeros.
      start: int32 [B].
      factors: (cos, sin), float32 [B, T, D/2], or None.
      scale, softcap, window: as for `cuda_ffi.attention.attend`.
      isa: the instruction set: "avx512", "avx2", "portable", or "auto" for the best that this processor has.

    Returns:
      (mixed [B, T, H, D], keys, values, length + T). All is computed in float32.

    Raises:
      RuntimeError: the library can't be used; `registration.why_not("cpu")` says why without raising.
    """
    registration.register("cpu")
    cos, sin = (jnp.zeros((0, 0, 0), jnp.float32),) * 2 if factors is None else factors
    outputs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (queries, keys, values, length)]
    attributes = {
        "scale": np.float32(scale),
        "softcap": np.float32(softcap or 0),
        "window": np.int64(window or 0),
        "isa": isa,
    }
    # Keys, values and length, the operands 3 to 5, give their memory to the results 1 to 3.
    call = jax.ffi.ffi_call(TARGET, outputs, input_output_aliases={3: 1, 4: 2, 5: 3})
    operands = (queries, new_keys, new_values, keys, values, length, positions, start, cos, sin)
    mixed, keys, values, length = call(*operands, **attributes)
    return mixed, keys, values, length
