"""Products on NVIDIA GPUs with weights whose scales are coded too, and a few entries beside them (SpQR)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from cuda_ffi import registration
from cuda_ffi.coded_product import Turned
from cuda_ffi.folding import fold_rows
from cuda_ffi.sparse_product_cuda import operands as entries_of

TARGET = "any4_cuda_coded_product"

MOST_ROWS = 4
"""The most rows of x for which the kernel is meant: it decodes the weight anew for each."""

_BITS = 3
_GROUP = _RUN = 16
_INPUTS = 128
_MOST_INPUTS = 28672
_ROWS = 32


def why_not(
    x_dtype, rows: int, bits: int, group_size: int, shape: tuple[int, ...], lut_dtype, scales: list[Turned]
) -> str | None:
    """None if the kernel suits operands of these dtypes and sizes, else the reason in words.

    Args:
      rows: of x.
      bits, group_size, shape: of the weight [N, K].
      scales: the scales, and the offsets if there are any; only shapes and dtypes are read.
    """
    n, k = shape
    if x_dtype != jnp.bfloat16:
        return f"x is {x_dtype}, with coded scales it takes bfloat16"
    if rows > MOST_ROWS:
        return f"x has {rows} rows, with coded scales it takes at most {MOST_ROWS}"
    if bits != _BITS or group_size != _GROUP:
        found = f"codes have {bits} bits in groups of {group_size}"
        return f"{found}, with coded scales it takes {_BITS} in groups of {_GROUP}"
    if k > _MOST_INPUTS:
        return f"rows have {k} inputs, with coded scales it takes at most {_MOST_INPUTS}"
    if k == 0 or k % _INPUTS or n % _ROWS:
        return f"the weight is {n} x {k}, with coded scales it takes multiples of {_ROWS} x {_INPUTS}"
    if lut_dtype not in (jnp.bfloat16, jnp.int8):
        return f"the table is {lut_dtype}, with coded scales it takes bfloat16 and int8"
    for each in scales:
        if len(each.codes) != 2 or each.run != _RUN:
            return f"scales are not coded in {_BITS} bits, in runs of {_RUN} rows"
        if any(a.dtype != jnp.bfloat16 for a in (each.lut, each.scales, each.offsets)):
            return "scales of coded scales are not bfloat16"
    return None


def coded_product(
    x: jax.Array,
    codes: tuple[jax.Array, ...],
    lut: jax.Array,
    scales: Turned,
    offsets: Turned | None,
    entries: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    *,
    uniform: bool,
) -> jax.Array:
    """y = x W^T [M, N] in bfloat16, accumulated in float32, in one launch, with nothing decoded to memory.

    Under vmap over x alone it has more rows; over weights it becomes a loop.

    Args:
      x: bfloat16 [M, K].
      codes, lut, scales, offsets: of W's coded part, for which `why_not` is None but for the number of rows; 3 bits in
        groups of 16.
      entries: ends, columns and values of what W has beside it, as `sparse_product_cuda.sparse_product` takes them.
      uniform: whether the table is an arithmetic ramp; with one table for all rows that is faster.

    Raises:
      RuntimeError: the library can't be used; `registration.why_not("cuda")` says why without raising.
    """
    registration.register("cuda")
    coded = [codes[0], codes[1], lut]
    for each in (scales, offsets):
        if each is None:
            coded += [jnp.zeros(0, jnp.uint8)] * 2 + [jnp.zeros(0, jnp.bfloat16)] * 3
        else:
            coded += [*each.codes, each.lut, each.scales, each.offsets]
    few = (jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.uint16), jnp.zeros(0, jnp.bfloat16))
    coded += few if entries is None else entries_of(*entries)
    return _call(uniform and lut.shape[0] == 1)(x, *coded)


@functools.cache
def _call(ramp: bool) -> Callable[..., jax.Array]:
    """The product of (x, *operands) with its rule for vmap, which may add rows."""

    @fold_rows
    def call(x, *operands):
        y = jax.ShapeDtypeStruct((x.shape[0], operands[0].shape[0]), x.dtype)
        return jax.ffi.ffi_call(TARGET, y)(x, *operands, ramp=ramp)

    return call
