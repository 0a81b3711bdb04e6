"""Products with few entries on the CPU, over plain arrays in the layout of layout.py."""

import jax
import jax.numpy as jnp

from cuda_ffi import registration
from cuda_ffi.folding import fold_rows

TARGET = "any4_cpu_sparse_product"


def sparse_product(x: jax.Array, ends: jax.Array, columns: jax.Array, values: jax.Array) -> jax.Array:
    """y = x W^T [M, N] in x's dtype, accumulated in float32, where row n of W has the values of a few columns.

    Under vmap over x alone it stays one call, with more rows; over weights it becomes a loop.

    Args:
      x: [M, K], a floating dtype.
      ends: integers [N]; row n's entries are those of its block from the end of the row before, or 0, to ends[n].
      columns: uint16 or int32 [B, E]; N / B rows are in a block. Those that aren't below K count for nothing.
      values: a floating dtype [B, E].

    Raises:
      RuntimeError: the library can't be used; `registration.why_not("cpu")` says why without raising.
    """
    registration.register("cpu")
    stored = values if values.dtype in (jnp.float32, jnp.bfloat16) else values.astype(jnp.float32)
    columns = columns if columns.dtype in (jnp.uint16, jnp.int32) else columns.astype(jnp.int32)
    return _call(x.astype(jnp.float32), ends.astype(jnp.int32), columns, stored).astype(x.dtype)


@fold_rows
def _call(x, ends, columns, values):
    y = jax.ShapeDtypeStruct((x.shape[0], ends.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(TARGET, y)(x, ends, columns, values)
