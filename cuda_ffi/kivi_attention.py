"""Attention of one new token a row over a KIVI cache, in which its key and value are put, over plain arrays.

Letters: B rows, H query heads, Hkv key and value heads, D head size, G numbers in a group, R exact tokens, P positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import registration
from cuda_ffi.attention import MOST_PAIRS, MOST_PARTS, MOST_SLOTS
from cuda_ffi.dtypes import why_not as dtypes_why_not

TARGET = "any4_cuda_kivi_attention"
SIZES = (64, 128)
GROUPS = (32, 64, 128)
TILE = 64
"""Tokens of a tile: R must be a multiple of it, so that a tile's keys are all exact or all codes."""
MOST_SHARED = 8
"""The most query heads on one key head."""


class Held(NamedTuple):
    """The arrays of a cache: T is bfloat16 or float16, and P may be different for keys and values.

    Attributes:
      keys, values: T [B, Hkv, R, D], the token at position p in place p mod R.
      key_codes: uint8 [B, Hkv, D, P * bits / 8].
      key_steps, key_lowest: T [B, Hkv, D, P / G].
      value_codes: uint8 [B, Hkv, P, D * bits / 8].
      value_steps, value_lowest: T [B, Hkv, P, D / min(G, D)].
      length: int32 scalar, the slots in use.
    """

    keys: jax.Array
    values: jax.Array
    key_codes: jax.Array
    key_steps: jax.Array
    key_lowest: jax.Array
    value_codes: jax.Array
    value_steps: jax.Array
    value_lowest: jax.Array
    length: jax.Array


def why_not(heads: int, group_size: int, held: Held, *dtypes: jax.typing.DTypeLike) -> str | None:
    """None if the kernel takes H = `heads`, G = `group_size`, this cache and arrays of these dtypes; else the reason in
    words."""
    rows, groups, residual, size = held.keys.shape
    positions = held.key_steps.shape[-1] * group_size, held.value_codes.shape[2]
    reason = dtypes_why_not(("bfloat16", "float16"), *dtypes, held.keys.dtype)
    if reason is not None:
        return reason
    if size not in SIZES:
        return f"a head has {size} channels, not {' or '.join(map(str, SIZES))}"
    if heads > MOST_SHARED * groups:
        return f"{heads // groups} query heads share a key head, more than {MOST_SHARED}"
    if group_size not in GROUPS:
        return f"{group_size} numbers share a step, not {', '.join(map(str, GROUPS[:-1]))} or {GROUPS[-1]}"
    if residual % TILE:
        return f"the newest {residual} tokens are exact, which is no multiple of {TILE}"
    if rows * groups > MOST_PAIRS:
        return f"{rows} rows of {groups} key heads are {rows * groups} pairs, more than {MOST_PAIRS}"
    for count in positions:
        if count % (2 * group_size):
            return f"the cache has {count} positions, which is no multiple of {2 * group_size}"
    if max(positions) > MOST_SLOTS:
        return f"the cache has {max(positions)} positions, more than {MOST_SLOTS}"
    return None


def attend(
    queries: jax.Array,
    new_keys: jax.Array,
    new_values: jax.Array,
    held: Held,
    positions: jax.Array,
    start: jax.Array,
    factors: tuple[jax.Array, jax.Array] | None,
    *,
    group_size: int,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[jax.Array, Held]:
    """Puts the new keys and values into the cache, and attends from position 0 of each row to the new token's.

    Of n tokens of a row, the new one's included, n mod R keys, or R if that is 0, and the newest R values are exact to
    it; codes stand for numbers rounded to the queries' dtype. As a key fills up the ring, all its keys become codes; as
    a value leaves its ring, it does. Where the program gives the cache away, it is changed in place. There is no rule
    for vmap and no gradient.

    Args:
      queries: [B, H, D], bfloat16 or float16 like all arrays without another dtype.
      new_keys, new_values: [B, Hkv, D].
      held: the cache. Its length isn't read: it must be positions + start, which is alike in all rows.
      positions, start: int32 [B]. A row whose position is negative gets nothing, and zeros.
      factors, scale, softcap, window: as for `cuda_ffi.attention.attend`.
      group_size: G.

    Returns:
      (mixed [B, H, D], the cache). All else is computed in float32.

    Raises:
      RuntimeError: the library can't be used; `registration.why_not("cuda")` says why without raising.
    """
    registration.register("cuda")
    rows, heads, size = queries.shape
    cos, sin = (jnp.zeros((0, 0), jnp.float32),) * 2 if factors is None else factors
    outputs = [
        *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (queries, *held)),
        jax.ShapeDtypeStruct((rows, heads, MOST_PARTS, size + 2), jnp.float32),
    ]
    attributes = {
        "scale": np.float32(scale),
        "softcap": np.float32(softcap or 0),
        "window": np.int64(window or 0),
        "group_size": np.int64(group_size),
    }
    # The cache, from operand 3 on, gives its memory to the results from 1 on.
    call = jax.ffi.ffi_call(TARGET, outputs, input_output_aliases={3 + i: 1 + i for i in range(len(held))})
    mixed, *new, _ = call(queries, new_keys, new_values, *held, positions, start, cos, sin, **attributes)
    return mixed, Held(*new)
