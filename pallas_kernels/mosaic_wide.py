"""y = x W^T on Hopper for many rows of x: a block computes 128 rows of W by up to 256 of x.

One warpgroup copies codes and inputs to shared memory by TMA. Two others decode 64 rows of W each and multiply.

What limits it (H100, 8192 x 8192, M = 512, 125 us of the device): a step of a block takes about 3300 clocks, of which
products alone need 2048. Neither a barrier that makes the two warpgroups decode and multiply in turns nor a cluster of
two blocks that share x by multicast made it faster, nor tiles of 128 rows of x.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_registers as registers
from pallas_kernels.mosaic_registers import INPUTS, ROWS

# Of a lane, of the 65536 that a multiprocessor has: sums take 128 of a computing warpgroup, copying takes few.
_COMPUTING_REGISTERS, _COPYING_REGISTERS = 232, 40


@dataclasses.dataclass(frozen=True)
class Config:
    """Attributes:
    columns: rows of x a block takes, a multiple of 8, at most 256.
    stages: steps of 128 inputs whose codes and inputs are in shared memory or under way to it.
    """

    columns: int = 256
    stages: int = 3


def lut_product_wide(
    x: jax.Array,
    codes: jax.Array,
    lut: jax.Array,
    scales: jax.Array,
    offsets: jax.Array | None,
    group_size: int,
    config: Config,
) -> jax.Array:
    """y [M, N] in x's dtype; see lut_product. N is a multiple of 128, K of 128; of 4 bits; all floating operands are
    bfloat16, or all float16; a group is a multiple of 128 inputs, or 64, 32, or the row."""
    (m, k), n = x.shape, codes.shape[0]
    columns, steps = config.columns, k // INPUTS
    stages = min(config.stages, steps)
    tiles_of_x = pl.cdiv(m, columns)

    def kernel(x_ref, codes_ref, lut_ref, scales_ref, *refs):
        (*offsets_refs, y_ref), scratch = refs[: 1 + (offsets is not None)], refs[1 + (offsets is not None) :]
        codes_smem, x_smem, arrived, used = scratch
        own = lax.axis_index("warpgroup")
        first_row = lax.axis_index("tile") * (2 * ROWS)
        tile_of_x = lax.axis_index("tile_of_x")
        first_column = tile_of_x * columns

        @pl.when(own == 2)
        def _copy():
            plgpu.set_max_registers(_COPYING_REGISTERS, action="decrease")

            def fetch(step, slot):
                bytes_ = pl.ds(step * (INPUTS // 2), INPUTS // 2)
                tile = codes_ref.at[pl.ds(first_row, 2 * ROWS), bytes_]
                plgpu.copy_gmem_to_smem(tile, codes_smem.at[slot], arrived.at[slot])
                inputs = x_ref.at[pl.ds(first_column, columns), pl.ds(step * INPUTS, INPUTS)]
                plgpu.copy_gmem_to_smem(inputs, x_smem.at[slot], arrived.at[slot])

            for step in range(stages):
                fetch(step, step)

            @pl.loop(0, steps - stages)
            def _(step):
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(used.at[slot])
                fetch(step + stages, slot)

        @pl.when(own < 2)
        def _compute():
            plgpu.set_max_registers(_COMPUTING_REGISTERS, action="increase")
            rows = pl.ds(first_row + own * ROWS, ROWS)
            words = registers.table_words(lut_ref.at[rows] if lut_ref.shape[0] > 1 else lut_ref)

            def affine(step):
                return [registers.group_pair(ref.at[rows], step, group_size) for ref in (scales_ref, *offsets_refs)]

            def add_products(sums_ref):
                def one(step, pairs):
                    slot = lax.rem(step, stages)
                    ahead = affine(jnp.minimum(step + 1, steps - 1))
                    plgpu.barrier_wait(arrived.at[slot])
                    scale, *offset = pairs
                    tile = codes_smem.at[slot, pl.ds(own * ROWS, ROWS)]
                    w = registers.dequantized(tile, words, scale, offset[0] if offset else None, x.dtype)
                    plgpu.wgmma(sums_ref, w, x_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(used.at[slot])
                    return ahead

                lax.fori_loop(0, steps, one, affine(0))
                return sums_ref[...]

            sums = pl.run_scoped(add_products, plgpu.ACC((ROWS, columns), jnp.float32))
            out = y_ref.at[pl.ds(first_column, columns), rows]
            ragged = m % columns
            if not ragged:
                registers.store_transposed(out, sums, columns, x.dtype)
                return

            @pl.when(tile_of_x < tiles_of_x - 1)
            def _():
                registers.store_transposed(out, sums, columns, x.dtype)

            @pl.when(tile_of_x == tiles_of_x - 1)
            def _():
                registers.store_transposed(out, sums, ragged, x.dtype)

    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, n), x.dtype),
        # Blocks of the same rows of W follow each other, so that codes come from memory once.
        grid=(n // (2 * ROWS), tiles_of_x),
        grid_names=("tile", "tile_of_x"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        scratch_types=[
            plgpu.SMEM((stages, 2 * ROWS, INPUTS // 2), jnp.uint8),
            plgpu.SMEM((stages, columns, INPUTS), x.dtype, transforms=swizzled),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ],
    )(registers.reordered(x, tiles_of_x * columns), codes, lut, scales, *([] if offsets is None else [offsets]))
