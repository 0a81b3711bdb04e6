"""The product with a LUT-coded weight on the CPU, over plain arrays in the layout of layout.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import registration

TARGET = "any4_cpu_lut_product"


def lut_product(
    x: jax.Array,
    codes: tuple[jax.Array, ...],
    lut: jax.Array,
    scales: jax.Array,
    offsets: jax.Array | None,
    *,
    bits: int,
    group_size: int,
    isa: str = "auto",
) -> jax.Array:
    """y = x W^T in x's dtype, accumulated in float32, without the dense W in memory.

    W[n, k] = lut[n or 0, codes[n, k]] * scales[n, k // group_size] + offsets[n, k // group_size]. Under vmap over x
    alone it stays one call with more rows; with a batch of weights it is a loop over them.

    Args:
      x: [M, K], float32, bfloat16 or float16.
      codes: one or two planes, uint8 [N, ceil(K * width / 8)].
      lut: [N or 1, 2**bits], a floating dtype.
      scales: [N, ceil(K / group_size)], a floating dtype, or uint8 for exponents of e8m0.
      offsets: like scales but floating, or None.
      bits: 1 to 6, or 8.
      group_size: at least 1.
      isa: "auto" for the best that this processor has, or "avx512", "avx2", "portable" by name.

    Raises:
      RuntimeError: the library can't be used; `registration.why_not("cpu")` says why without raising.
    """
    registration.register("cpu")
    # Where there is none, an array of no elements takes its place.
    high = codes[1] if len(codes) > 1 else jnp.zeros((0, 0), jnp.uint8)
    absent = jnp.zeros((0, 0), jnp.float32)
    operands = (codes[0], high, _readable(lut), _readable(scales), absent if offsets is None else _readable(offsets))
    call = _call(bits, min(group_size, max(x.shape[-1], 1)), isa)
    if x.dtype == jnp.float16:
        return call(x.astype(jnp.float32), *operands).astype(x.dtype)
    return call(x, *operands)


def _readable(stored: jax.Array) -> jax.Array:
    """The handler reads float32, bfloat16 and e8m0 as they are; float16 becomes float32, which holds its values."""
    return stored if stored.dtype in (jnp.float32, jnp.bfloat16, jnp.uint8) else stored.astype(jnp.float32)


@functools.cache
def _call(bits: int, group_size: int, isa: str):
    """The custom call on (x, *operands) with its rule for vmap, which jax.ffi can't derive from the handler."""

    @jax.custom_batching.custom_vmap
    def call(x, *operands):
        out = jax.ShapeDtypeStruct((x.shape[0], operands[0].shape[0]), x.dtype)
        return jax.ffi.ffi_call(TARGET, out)(
            x, *operands, bits=np.int64(bits), group_size=np.int64(group_size), isa=isa
        )

    @call.def_vmap
    def _rule(axis_size, batched, x, *operands):
        if not any(batched[1:]):
            y = call(x.reshape(-1, x.shape[-1]), *operands)
            return y.reshape(axis_size, -1, y.shape[-1]), True

        def one(taken):
            return call(*(t if b else whole for t, b, whole in zip(taken, batched, (x, *operands), strict=True)))

        # What isn't batched is left out of the loop's input; a scalar stands in for it.
        looped = [a if b else jnp.zeros(axis_size) for a, b in zip((x, *operands), batched, strict=True)]
        return jax.lax.map(one, looped), True

    return call
