"""Products with few entries on NVIDIA GPUs, over plain arrays in the layout of layout.py."""

import jax
import jax.numpy as jnp

from cuda_ffi import registration
from cuda_ffi.folding import fold_rows

TARGET = "any4_cuda_sparse_product"

MOST_ROWS = 64
"""The most rows of x for which the kernel is meant: it gathers inputs anew for each eight."""

_INDICES = (jnp.uint16, jnp.int32)


def why_not(x_dtype, rows: int) -> str | None:
    """None if the kernel suits so many rows of x of that dtype, else the reason in words."""
    if x_dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"x is {x_dtype}, it takes float32, bfloat16 and float16"
    if rows > MOST_ROWS:
        return f"x has {rows} rows, it takes at most {MOST_ROWS} for few entries"
    return None


def sparse_product(x: jax.Array, ends: jax.Array, columns: jax.Array, values: jax.Array) -> jax.Array:
    """y = x W^T [M, N] in x's dtype, accumulated in float32, where row n of W has the values of a few columns.

    Under vmap over x alone it stays one call, with more rows; over weights it becomes a loop.

    Args:
      x: [M, K], float32, bfloat16 or float16.
      ends, columns, values: as `cuda_ffi.sparse_product.sparse_product` has them.

    Raises:
      RuntimeError: the library can't be used; `registration.why_not("cuda")` says why without raising.
    """
    registration.register("cuda")
    return _call(x, *operands(ends, columns, values))


def operands(ends: jax.Array, columns: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arrays in dtypes that kernels read; those that `Sparse` has by default stay as they are."""
    ends, columns = (a if a.dtype in _INDICES else a.astype(jnp.int32) for a in (ends, columns))
    return ends, columns, values if values.dtype in (jnp.float32, jnp.bfloat16) else values.astype(jnp.float32)


@fold_rows
def _call(x, ends, columns, values):
    y = jax.ShapeDtypeStruct((x.shape[0], ends.shape[0]), x.dtype)
    return jax.ffi.ffi_call(TARGET, y)(x, ends, columns, values)
