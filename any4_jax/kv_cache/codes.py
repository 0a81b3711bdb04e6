"""Keys or values as packed codes: groups along the last axis, each with a step and a lowest value.

    x = lowest + step * code,   code in 0 .. 2^bits - 1

Both are computed in float32, and stored in the dtype of the cache. The lowest is a number of the group itself, so it is
stored exactly. A group whose numbers are all equal, or as good as equal, has the step 0 and is its lowest.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from any4_jax.packing import pack, unpack
from any4_jax.scaling import expand, rounded, to_groups

Slab = TypeVar("Slab", bound=Any)
"""A pytree of arrays that all have the same leading axes, such as `Codes`."""


class Codes(NamedTuple):
    """Numbers [..., N] in groups of G.

    Attributes:
        packed: uint8 [..., ceil(N * bits / 8)], in the layout of `any4_jax.packing`.
        steps: [..., ceil(N / G)].
        lowest: the same shape and dtype.
    """

    packed: jax.Array
    steps: jax.Array
    lowest: jax.Array


def encode(x: jax.Array, bits: int, group_size: int, dtype: DTypeLike) -> Codes:
    """The codes of x [..., N], each nearest to its number, with steps and lowest values in `dtype`.

    A group may be longer than N, and the last group is short where its size does not divide N.
    """
    group_size, levels = min(group_size, x.shape[-1]), 2**bits - 1
    x = x.astype(jnp.float32)
    groups = to_groups(x, group_size)
    lowest = groups.min(axis=-1)
    steps = rounded((groups.max(axis=-1) - lowest) / levels, dtype)
    # XLA may flush a subnormal step to zero, so it is stored as zero.
    steps = jnp.where(steps < jnp.finfo(dtype).tiny, jnp.zeros_like(steps), steps)
    wide = steps.astype(jnp.float32)[..., None]
    codes = jnp.where(wide == 0, 0.0, (groups - lowest[..., None]) / jnp.where(wide == 0, 1.0, wide))
    codes = jnp.clip(jnp.round(codes), 0, levels).astype(jnp.uint8)
    codes = codes.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    packed = pack(codes, bits)
    assert isinstance(packed, jax.Array)
    return Codes(packed, steps, rounded(lowest, dtype))


def decode(codes: Codes, bits: int, group_size: int, count: int) -> jax.Array:
    """The inverse of `encode`: float32 [..., N] for N = `count`."""
    group_size = min(group_size, count)
    steps, lowest = (expand(each.astype(jnp.float32), group_size, count) for each in (codes.steps, codes.lowest))
    return unpack(codes.packed, bits, count).astype(jnp.float32) * steps + lowest


def update(
    slab: Slab, new: Slab, place: Callable[[int], tuple[jax.Array | int, ...]], due: jax.Array | bool = True
) -> Slab:
    """The slab with new numbers in place of some, written in place where it can be.

    Args:
        slab: of [B, Hkv, ...], or any number of heads.
        new: of [Hkv, ...], of one row.
        place: the indices in the slab at which an array whose last axis has this size begins.
        due: which of the new ones to write, broadcasts with their arrays.
    """

    def write(slab: jax.Array, new: jax.Array) -> jax.Array:
        at = place(new.shape[-1])
        if due is not True:
            new = jnp.where(due, new, jax.lax.dynamic_slice(slab, at, (1, *new.shape))[0])
        return jax.lax.dynamic_update_slice(slab, new[None], at)

    return jax.tree.map(write, slab, new)
