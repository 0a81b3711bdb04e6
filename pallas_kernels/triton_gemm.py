"""y = x W^T for several rows of x on tensor cores: codes are decoded where a tensor core takes its left operand.

A program takes a tile of rows of W and multiplies table entries by inputs, group by group; it applies scales and
offsets to the float32 sums of a group. The even and the odd inputs are two products, since a byte of codes holds one of
each, so x is first split that way. Offsets need the sums of a group's inputs, which are a product with ones; tensor
cores have the time for it.

What limits it (H100, 8192 x 8192, M = 16, 39 us of the device): a program's steps follow each other, so the tensor
cores wait for decoding, and decoding waits for them; mosaic_narrow keeps more in flight.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.triton_lookup import codes_of, permuted, table_words
from pallas_kernels.triton_operands import Weight, load_codes


@dataclasses.dataclass(frozen=True)
class Config:
    """How a program works.

    Attributes:
      rows: rows of W that it takes, a power of two, 16 or more.
      columns: rows of x that it takes, a power of two, 16 or more.
      warps: its warps.
      stages: stages of codes and inputs that it loads ahead.
      split: programs that split the groups of a row; XLA adds up their float32 sums.
    """

    rows: int = 64
    columns: int = 16
    warps: int = 4
    stages: int = 3
    split: int = 4


def inputs_of_step(w: Weight) -> int:
    """How many inputs a step takes; a step lies in one group."""
    return min(128, w.group_size) if w.group_size < w.k else 128


def lut_gemm(x: jax.Array, w: Weight, config: Config, lookup: str, interpret: bool = False) -> jax.Array:
    """y [M, N] in x's dtype; see lut_product.

    Args:
      x: [M, K], bfloat16 or float16, the dtype of the table.
      w: with 4-bit codes, groups of a power of two from 32 on or of the whole row, and floating scales.
      lookup: "permute", or "loads", which can be interpreted.
    """
    m, k, n = *x.shape, w.n
    step = inputs_of_step(w)
    half = step // 2
    steps = pl.cdiv(k, step)
    share = pl.cdiv(steps, config.split)
    whole = k % step == 0 and steps % config.split == 0

    def kernel(x_ref, *refs):
        *weight_refs, y_ref = refs
        ref = w.replaced(weight_refs)
        rows = pl.program_id(0) * config.rows + jnp.arange(config.rows, dtype=jnp.int32)
        own = jnp.minimum(rows, n - 1)
        columns = pl.program_id(1) * config.columns + jnp.arange(config.columns, dtype=jnp.int32)
        first_step = pl.program_id(2) * share
        table_rows = own if ref.lut.shape[0] > 1 else jnp.zeros_like(own)
        if lookup == "permute":
            words = table_words(lambda code: plt.load(ref.lut.at[table_rows, jnp.full_like(own, code)]))

        def entries(codes: jax.Array, places: jax.Array) -> list[jax.Array]:
            if lookup == "permute":
                return [permuted(codes, own, words, part, x.dtype) for part in ("even", "odd")]
            spread = jnp.broadcast_to(table_rows[:, None], codes.shape)
            return [plt.load(ref.lut.at[spread, code]) for code in codes_of([codes], places[None, :], 4)]

        def turn(i, total):
            at = first_step + i
            places = at * half + jnp.arange(half, dtype=jnp.int32)
            (codes,) = load_codes(ref, own, places, whole)
            inside = None
            if not whole or m % config.columns:
                inside = (places < x_ref.shape[2])[:, None] & (columns < m)[None, :]
                if steps % config.split:
                    # What lies past this program's share belongs to the next program.
                    inside &= jnp.broadcast_to(at < steps, inside.shape)
            zero = jnp.zeros((half, config.columns), jnp.int32)
            row, column = jnp.minimum(columns, m - 1)[None, :] + zero, places[:, None] + zero
            group = jnp.minimum(jnp.full_like(own, at * step // w.group_size), ref.scales.shape[1] - 1)
            dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
            products = sums = jnp.zeros((config.rows, config.columns), jnp.float32)
            ones = jnp.ones((config.rows, half), x.dtype)
            for parity, entry in enumerate(entries(codes, places)):
                source = x_ref.at[zero + parity, row, column]
                v = plt.load(source) if inside is None else plt.load(source, mask=inside, other=0)
                products += dot(entry, v)
                if ref.offsets is not None:
                    sums += dot(ones, v)
            total += plt.load(ref.scales.at[own, group]).astype(jnp.float32)[:, None] * products
            if ref.offsets is not None:
                total += plt.load(ref.offsets.at[own, group]).astype(jnp.float32)[:, None] * sums
            return total

        total = jax.lax.fori_loop(0, share, turn, jnp.zeros((config.rows, config.columns), jnp.float32))
        zero = jnp.zeros(total.shape, jnp.int32)
        at = y_ref.at[zero + pl.program_id(2), columns[None, :] + zero, rows[:, None] + zero]
        mask = None
        if m % config.columns or n % config.rows:
            mask = (rows < n)[:, None] & (columns < m)[None, :]
        plt.store(at, total.astype(y_ref.dtype), mask=mask)

    split = jnp.pad(x, [(0, 0), (0, k % 2)]).reshape(m, -1, 2).transpose(2, 0, 1)
    parts = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((config.split, m, n), x.dtype if config.split == 1 else jnp.float32),
        grid=(pl.cdiv(n, config.rows), pl.cdiv(m, config.columns), config.split),
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="any4_lut_gemm",
    )(split, *w.arrays())
    return parts[0] if config.split == 1 else parts.sum(0).astype(x.dtype)
