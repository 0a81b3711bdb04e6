"""Attention of one new token a row over a KVQuant cache that holds it already, over plain arrays; on a GPU.

Letters: B rows, H query heads, Hkv key and value heads, D head size, P positions, O slots for outliers, N first tokens,
R newest ones, L levels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import registration
from cuda_ffi.attention import MOST_PAIRS, MOST_PARTS, MOST_SLOTS
from cuda_ffi.dtypes import why_not as dtypes_why_not

TARGET = "any4_cuda_kvquant_attention"
CHUNK = 64
"""Tokens whose keys are rotated by their places, as in csrc/cuda/kvquant.h."""
SIZES = (64, 128)
MOST_OUTLIERS = 48
POSITIONS_UNIT = 8
"""P is a multiple of it, so that what belongs to a row's tokens begins where 16 bytes do."""


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


Factors = tuple[jax.Array, jax.Array] | None
"""(cos, sin), float32, of angles that are proportional to the position, times an amplitude if the rotation has one; or
None if there is no rotation."""


def why_not(heads: int, held: Held, *dtypes: jax.typing.DTypeLike) -> str | None:
    """None if the kernel takes H = `heads`, this cache, and queries of these dtypes; else the reason in words."""
    rows, groups, recent, size = held.recent_keys.shape
    room, slots = held.keys.outliers.shape[2:]
    reason = dtypes_why_not(("bfloat16", "float16"), *dtypes, held.recent_keys.dtype)
    if reason is not None:
        return reason
    if size not in SIZES:
        return f"a head has {size} channels, not {' or '.join(map(str, SIZES))}"
    if slots > MOST_OUTLIERS:
        return f"a token has slots for {slots} outliers, more than {MOST_OUTLIERS}"
    if rows * groups > MOST_PAIRS:
        return f"{rows} rows of {groups} key heads are {rows * groups} pairs, more than {MOST_PAIRS}"
    if room % POSITIONS_UNIT:
        return f"the cache has {room} positions, which is no multiple of {POSITIONS_UNIT}"
    if room + recent > MOST_SLOTS:
        return f"the cache has {room + recent} positions, more than {MOST_SLOTS}"
    return None


def chunks(held: Held, chunk: int = CHUNK) -> int:
    """How many chunks of positions the cache has."""
    return -(-(held.keys.outliers.shape[2] + held.recent_keys.shape[2]) // chunk)


def attend(
    queries: jax.Array,
    held: Held,
    positions: jax.Array,
    near: Factors,
    far: Factors,
    *,
    bits: int,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> jax.Array:
    """Attends from position 0 of each row to the new token's.

    The first N tokens and the newest R are exact. Numbers of codes are rounded to the queries' dtype, with levels,
    scales and offsets that were rounded to it before; rotated keys are too. There is no rule for vmap and no gradient.

    Args:
      queries: [B, H, D], bfloat16 or float16 like the cache, rotated; the cache's keys are not.
      held: the cache with the new tokens.
      positions: int32 [B], of the new tokens. A row whose position is negative gets zeros.
      near: [CHUNK, D/2], of the positions from 0 on.
      far: [`chunks`, D/2], of the positions 0, CHUNK, 2 CHUNK and so on.
      bits: 4, 3 or 2; L is 2**bits.
      scale, softcap, window: as for `cuda_ffi.attention.attend`.

    Returns:
      [B, H, D]. All else is computed in float32.

    Raises:
      RuntimeError: the library can't be used; `registration.why_not("cuda")` says why without raising.
    """
    registration.register("cuda")
    rows, heads, size = queries.shape
    outputs = [
        jax.ShapeDtypeStruct(queries.shape, queries.dtype),
        jax.ShapeDtypeStruct((rows, heads, MOST_PARTS, size + 2), jnp.float32),
    ]
    operands = queries, held, positions, near, far
    return call(TARGET, outputs, *operands, bits=bits, scale=scale, softcap=softcap, window=window)[0]


def call(
    target: str,
    outputs: Any,
    queries: jax.Array,
    held: Held,
    positions: jax.Array,
    near: Factors,
    far: Factors,
    *,
    bits: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    **more: Any,
) -> Any:
    """The results of a handler of either kind, which take the same operands; `more` is its own attributes."""
    nothing = jnp.zeros((0, 0), jnp.float32)
    factors = (nothing,) * 4 if near is None or far is None else (*near, *far)
    attributes = {
        "scale": np.float32(scale),
        "softcap": np.float32(softcap or 0),
        "window": np.int64(window or 0),
        "bits": np.int64(bits),
        **more,
    }
    operands = queries, *_flat(held.keys), *_flat(held.values), *held[2:], positions, *factors
    return jax.ffi.ffi_call(target, outputs)(*operands, **attributes)


def _flat(coded: Coded) -> Sequence[jax.Array]:
    """With an empty plane for one that is absent."""
    low, *high = coded.planes
    rest = [] if coded.ranges is None else [coded.ranges]
    return [low, *(high or [jnp.zeros((0, 0, 0, 0), jnp.uint8)]), coded.outliers, coded.channels, *rest]
