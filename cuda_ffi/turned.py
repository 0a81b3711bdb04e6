"""Coded matrices decoded with their axes exchanged, on the CPU: scales with codes along the rows that they scale."""

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import registration

TARGET = "any4_cpu_turned"
BITS = (2, 3, 4)
RUN = 8
"""Runs of codes with one range are of a multiple of so many."""


def turned_values(
    codes: tuple[jax.Array, ...],
    lut: jax.Array,
    scales: jax.Array,
    offsets: jax.Array,
    *,
    n: int,
    group_size: int,
    isa: str = "auto",
) -> jax.Array:
    """W[n, k] = lut[codes[k, n]] * scales[k, n // G] + offsets[k, n // G], float32 [N, K].

    Args:
      codes: one or two planes of codes of BITS bits, uint8 [K, ceil(N * width / 8)].
      lut: a ramp [1, 2**bits].
      scales, offsets: floating [K, ceil(N / G)].
      n: N.
      group_size: G, a multiple of RUN.
      isa: the instruction set: "avx512", "avx2", "portable", or "auto" for the best that this processor has.

    Raises:
      RuntimeError: the library can't be used; `registration.why_not("cpu")` says why without raising.
    """
    registration.register("cpu")
    high = codes[1] if len(codes) > 1 else jnp.zeros((0, 0), jnp.uint8)
    values = jax.ShapeDtypeStruct((n, scales.shape[0]), jnp.float32)
    call = jax.ffi.ffi_call(TARGET, values, vmap_method="sequential")
    floats = (array.astype(jnp.float32) for array in (lut.reshape(-1), scales, offsets))
    return call(codes[0], high, *floats, run=np.int64(group_size), isa=isa)
