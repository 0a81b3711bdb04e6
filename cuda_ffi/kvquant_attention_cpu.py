"""Attention of one new token a row over a KVQuant cache that holds it already, on a CPU, over plain arrays.

Letters: B rows, H query heads, Hkv key and value heads, D head size, P positions, O slots for outliers, N first tokens,
R newest ones, L levels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import registration

TARGET = "any4_cpu_kvquant_attention"
CHUNK = 256
"""Tokens whose scores are computed at a time, as in csrc/cpu/attention.h."""
UNIT, MOST_SIZE = 32, 256


class Coded(NamedTuple):
    """Keys or values; T is the dtype of the cache.

    Attributes:
      planes: uint8 [B, Hkv, P, D * width / 8], one or two.
      outliers: T [B, 1, P, O].
      channels: uint8 or uint16 [B, 1, P, O], of Hkv * D.
      ranges: T [B, 1, P, 2], scale and offset of a value; None for keys.
    """

    planes: tuple[jax.Array, ...]
    outliers: jax.Array
    channels: jax.Array
    ranges: jax.Array | None


class Held(NamedTuple):
    """The arrays of a cache.

    Attributes:
      keys, values: those that are coded.
      key_levels, value_levels: float32 [L].
      scales, offsets: float32 [Hkv, D], of keys.
      first_keys, first_values: T [B, Hkv, N, D].
      recent_keys, recent_values: T [B, Hkv, R, D], the token at position p in place p mod R.
    """

    keys: Coded
    values: Coded
    key_levels: jax.Array
    scales: jax.Array
    offsets: jax.Array
    value_levels: jax.Array
    first_keys: jax.Array
    first_values: jax.Array
    recent_keys: jax.Array
    recent_values: jax.Array


def why_not(size: int, *dtypes: jax.typing.DTypeLike) -> str | None:
    """None if the kernel takes D = `size`, and queries and a cache of these dtypes; else the reason in words."""
    kinds = list(dict.fromkeys(jnp.dtype(dtype).name for dtype in dtypes))
    if len(kinds) > 1:
        return f"the dtypes of queries and cache differ, {' and '.join(kinds)}"
    if kinds[0] not in ("float32", "bfloat16"):
        return f"queries and cache are {kinds[0]}, not float32 or bfloat16"
    if size % UNIT or not 0 < size <= MOST_SIZE:
        return f"a head has {size} channels, which is no multiple of {UNIT} up to {MOST_SIZE}"
    return None


def chunks(held: Held) -> int:
    """How many chunks of CHUNK positions the cache has."""
    return -(-(held.keys.outliers.shape[2] + held.recent_keys.shape[2]) // CHUNK)


def attend(
    queries: jax.Array,
    held: Held,
    positions: jax.Array,
    near: tuple[jax.Array, jax.Array] | None,
    far: tuple[jax.Array, jax.Array] | None,
    *,
    bits: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    isa: str = "auto",
) -> jax.Array:
    """Attends from position 0 of each row to the new token's.

    The first N tokens and the newest R are exact. Numbers of codes aren't rounded. Results don't depend on the number
    of threads. There is no rule for vmap and no gradient.

    Args:
      queries: [B, H, D], float32 or bfloat16 like the cache, rotated; the cache's keys are not.
      held: the cache with the new tokens.
      positions: int32 [B], of the new tokens. A row whose position is negative gets zeros.
      near: (cos, sin), float32 [CHUNK, D/2], of the angles at positions from 0 on, times an amplitude if the rotation
        has one; None if there is no rotation. The angles must be proportional to the position.
      far: the same [`chunks`, D/2] at positions 0, CHUNK, 2 CHUNK and so on.
      bits: 4, 3 or 2; L is 2**bits.
      scale, softcap, window: as for `cuda_ffi.attention.attend`.
      isa: the instruction set: "avx512", "avx2", "portable", or "auto" for the best that this processor has.

    Returns:
      [B, H, D]. All is computed in float32.

    Raises:
      RuntimeError: the library can't be used; `registration.why_not("cpu")` says why without raising.
    """
    registration.register("cpu")
    nothing = jnp.zeros((0, 0), jnp.float32)
    factors = (nothing,) * 4 if near is None or far is None else (*near, *far)
    attributes = {
        "scale": np.float32(scale),
        "softcap": np.float32(softcap or 0),
        "window": np.int64(window or 0),
        "bits": np.int64(bits),
        "isa": isa,
    }
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(queries.shape, queries.dtype))
    return call(queries, *_flat(held.keys), *_flat(held.values), *held[2:], positions, *factors, **attributes)


def _flat(coded: Coded) -> list[jax.Array]:
    """With an empty plane for one that is absent."""
    low, *high = coded.planes
    rest = [] if coded.ranges is None else [coded.ranges]
    return [low, *(high or [jnp.zeros((0, 0, 0, 0), jnp.uint8)]), coded.outliers, coded.channels, *rest]
