"""y = x W^T for few rows of x on CUDA cores: each code is decoded once, and its value multiplied by each row's input.

A lane decodes runs of 16 bytes of a row of W and sums their products by itself; it applies scales and offsets to the
sum of a run, which lies in one group. All arithmetic is float32. The kernel takes every format, group size and shape.

What limits it (H100, 8192 x 8192, M = 1, 27 us of the device; reading the codes alone takes 12.6): instructions. There
are 8 per weight, and schedulers start one in 63 % of the clocks (Nsight Compute): 125 registers per lane leave them 3.5
warps to choose from.
"""

import dataclasses
import functools

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
      rows_of_x: rows of x that it takes.
    """

    rows: int = 8
    columns: int = 512
    warps: int = 4
    rows_of_x: int = 1


def lut_gemv(x: jax.Array, w: Weight, config: Config, lookup: str, interpret: bool = False) -> jax.Array:
    """y [M, N] in x's dtype; see lut_product.

    Args:
      x: [M, K], bfloat16, float16 or float32.
      w: its scales are floating.
      lookup: one of triton_operands.LOOKUPS; "permute" can't be interpreted.
    """
    m, k, n, per_byte, chunk = *x.shape, w.n, w.per_byte, w.chunk
    rows_of_x, chunks = config.rows_of_x, config.columns // chunk
    turns = pl.cdiv(k, config.columns * per_byte)
    whole = k % (config.columns * per_byte) == 0

    def kernel(x_ref, *refs):
        *weight_refs, y_ref = refs
        ref = w.replaced(weight_refs)
        rows = pl.program_id(0) * config.rows + jnp.arange(config.rows, dtype=jnp.int32)
        own = jnp.minimum(rows, n - 1)
        first_of_x = pl.program_id(1) * rows_of_x
        decode = decoder(ref, own, lookup)
        columns_of = lambda turn: turn * config.columns + jnp.arange(config.columns, dtype=jnp.int32)  # noqa: E731

        def inputs(row: jax.Array, columns: jax.Array) -> list[jax.Array]:
            """The inputs of a row of x at each byte's first code, at its second code, ...: each float32 [columns]."""
            places = [per_byte * columns + i for i in range(per_byte)]
            at = [x_ref.at[jnp.full_like(columns, row), place] for place in places]
            if whole:
                return [plt.load(a).astype(jnp.float32) for a in at]
            return [
                plt.load(a, mask=place < k, other=0).astype(jnp.float32) for a, place in zip(at, places, strict=True)
            ]

        def turn(i, carry):
            sums, codes = carry
            # The next turn's codes are loaded while these are decoded.
            ahead = load_codes(ref, own, columns_of(jnp.minimum(i + 1, turns - 1)), whole)
            columns = columns_of(i)
            values = decode(codes, columns[None, :])
            group = (i * chunks + jnp.arange(chunks, dtype=jnp.int32)) * (chunk * per_byte) // w.group_size
            scales = group_values(ref.scales, own, group)
            offsets = None if ref.offsets is None else group_values(ref.offsets, own, group)
            added = []
            for r, total in enumerate(sums):
                xs = inputs(jnp.minimum(first_of_x + r, m - 1), columns)
                products = functools.reduce(jnp.add, [value * v[None, :] for value, v in zip(values, xs, strict=True)])
                total += scales * products.reshape(config.rows, chunks, chunk).sum(-1)
                if offsets is not None:
                    of_x = functools.reduce(jnp.add, xs).reshape(chunks, chunk).sum(-1)
                    total += offsets * of_x[None, :]
                added.append(total)
            return tuple(added), ahead

        zero = jnp.zeros((config.rows, chunks), jnp.float32)
        start = ((zero,) * rows_of_x, load_codes(ref, own, columns_of(0), whole))
        sums, _ = jax.lax.fori_loop(0, turns, turn, start)
        for r, total in enumerate(sums):
            row = first_of_x + r
            at = y_ref.at[jnp.full_like(rows, row), rows]
            mask = None if n % config.rows == 0 and m % rows_of_x == 0 else (rows < n) & (row < m)
            plt.store(at, total.sum(1).astype(y_ref.dtype), mask=mask)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=(pl.cdiv(n, config.rows), pl.cdiv(m, rows_of_x)),
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=1),
        interpret=interpret,
        name="any4_lut_gemv",
    )(x, *w.arrays())
