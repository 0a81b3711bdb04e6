"""Decodes W to a dense matrix in memory, for products of so many rows of x that XLA's product with that is faster.

Memory limits it (H100, 8192 x 8192): it writes 134 MB of bfloat16 and reads 37 MB.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.triton_operands import Weight, decoder, group_values, load_codes


@dataclasses.dataclass(frozen=True)
class Config:
    """How a program works.

    Attributes:
      rows: rows of W that it takes, a power of two.
      columns: bytes of the first plane of codes that it takes in a turn, a power of two, 16 or more.
      warps: its warps, a power of two.
    """

    rows: int = 4
    columns: int = 2048
    warps: int = 4


def lut_dequantize(w: Weight, dtype, config: Config, lookup: str, interpret: bool = False) -> jax.Array:
    """W [N, K], computed in float32 and rounded once to `dtype`, which is bfloat16, float16 or float32.

    Args:
      w: its scales are floating.
      lookup: one of triton_operands.LOOKUPS; "permute" can't be interpreted.
    """
    n, k, per_byte, chunk = w.n, w.k, w.per_byte, w.chunk
    chunks = config.columns // chunk
    inputs = config.columns * per_byte
    whole = k % inputs == 0

    def kernel(*refs):
        *weight_refs, out_ref = refs
        ref = w.replaced(weight_refs)
        rows = pl.program_id(0) * config.rows + jnp.arange(config.rows, dtype=jnp.int32)
        own = jnp.minimum(rows, n - 1)
        decode = decoder(ref, own, lookup)

        def turn(i, carry):
            columns = i * config.columns + jnp.arange(config.columns, dtype=jnp.int32)
            values = decode(load_codes(ref, own, columns, whole), columns[None, :])
            group = (i * chunks + jnp.arange(chunks, dtype=jnp.int32)) * (chunk * per_byte) // w.group_size

            def spread(stored):
                each = group_values(stored, own, group)[:, :, None]
                return jnp.broadcast_to(each, (config.rows, chunks, chunk)).reshape(config.rows, config.columns)

            scales = spread(ref.scales)
            dense = [value * scales for value in values]
            if ref.offsets is not None:
                offsets = spread(ref.offsets)
                dense = [value + offsets for value in dense]
            tile = _interleaved([value.astype(dtype) for value in dense])
            places = i * inputs + jnp.arange(inputs, dtype=jnp.int32)
            at = out_ref.at[rows[:, None], places[None, :]]
            mask = None
            if not whole or n % config.rows:
                mask = (rows < n)[:, None] & (places < k)[None, :]
            plt.store(at, tile, mask=mask)
            return carry

        jax.lax.fori_loop(0, pl.cdiv(k, inputs), turn, 0)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((n, k), dtype),
        grid=(pl.cdiv(n, config.rows),),
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=1),
        interpret=interpret,
        name="any4_lut_dequantize",
    )(*w.arrays())


def _interleaved(parts: list[jax.Array]) -> jax.Array:
    """[rows, p * columns] from p arrays [rows, columns]: the first elements of all, then the second ones, ...

    Triton joins two arrays at a time along a new last axis. Of four arrays, it first joins those that are two apart.
    """
    if len(parts) == 1:
        return parts[0]
    left, right = (_interleaved_axes(half) for half in (parts[::2], parts[1::2]))
    joined = jnp.stack([left, right], axis=-1)
    return joined.reshape(joined.shape[0], -1)


def _interleaved_axes(parts: list[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.stack(parts, axis=-1)
