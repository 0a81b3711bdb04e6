"""y = x W^T on Hopper for many rows of x: a block computes 128 rows of W by up to 256 of x.

    global memory   codes, x                 tables, scales, offsets                       y
                      |                        | loads, of scales a step ahead             ^
    copy              | warpgroup 2, TMA       |                                           | warpgroup 0, TMA
                      v                        v                                           |
    shared memory   stage s, rows 0-63 --->  warpgroup 0: decode, wgmma --> sums -->  results, where x
                             rows 64-127 ->  warpgroup 1: decode, wgmma --> sums -->  of stage 0 was

A step is 128 inputs, in two parts of 64; a part is decoded while the products of the part before are under way, so that
there always are some. `arrived[s]` completes when the copies of a step are there; `used[s]` when both warpgroups have
ended the products of that step, which each reports in the middle of the next; `done` when both have ended their last
step, and again when both have stored their results.

What limits it (H100, 8192 x 8192, M = 512, 93 us of the device): tensor cores, which are busy for 89 % of the clocks;
under that load there are 1.58 clocks in a nanosecond, not 1.98 (Nsight Compute). Sharing x between two blocks by
multicast made no difference.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_registers as registers
from pallas_kernels.mosaic_registers import INPUTS, PART, ROWS, SWIZZLED

# Per lane, of the 65536 that a multiprocessor has: sums take 128 of a computing warpgroup's, copying takes few.
_COMPUTING_REGISTERS, _COPYING_REGISTERS = 232, 40


@dataclasses.dataclass(frozen=True)
class Config:
    """How a block works.

    Attributes:
      columns: rows of x that it takes, a multiple of 16, at most 256.
      stages: steps of 128 inputs whose codes and inputs are in shared memory or on their way there.
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
    """y [M, N] in x's dtype; see lut_product.

    N and K are multiples of 128. Codes have 4 bits. The floating operands are all bfloat16 or all float16. A group is a
    multiple of 128 inputs, or 64, 32, or the row.
    """
    (m, k), n = x.shape, codes.shape[0]
    columns, steps = config.columns, k // INPUTS
    stages = min(config.stages, steps)
    rows_of_x = m + -m % 8

    def kernel(x_ref, codes_ref, lut_ref, scales_ref, *refs):
        (*offsets_refs, y_ref), scratch = refs[: 1 + (offsets is not None)], refs[1 + (offsets is not None) :]
        codes_smem, x_smem, arrived, used, done = scratch
        own = lax.axis_index("warpgroup")
        first_row = lax.axis_index("tile") * (2 * ROWS)
        first_column = lax.axis_index("tile_of_x") * columns

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
            # In their first step, the others give back the last stage, which they haven't had yet.
            plgpu.barrier_wait(used.at[stages - 1])

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
                return [registers.group_pairs(ref.at[rows], step, group_size) for ref in (scales_ref, *offsets_refs)]

            def add_products(sums_ref):
                def one(step, pairs):
                    slot = lax.rem(step, stages)
                    ahead = affine(jnp.minimum(step + 1, steps - 1))
                    plgpu.barrier_wait(arrived.at[slot])
                    scales, *offset = pairs
                    tile = codes_smem.at[slot, pl.ds(own * ROWS, ROWS)]
                    for part in range(INPUTS // PART):
                        # Meanwhile, the products of the part before are under way.
                        w = registers.dequantized(tile, part, words, scales, offset[0] if offset else None, x.dtype)
                        inputs = x_smem.at[slot, :, pl.ds(part * PART, PART)]
                        plgpu.wgmma(sums_ref, w, inputs.transpose((1, 0)))
                        plgpu.wgmma_wait(1)
                        if part == 0:
                            # Now the products of the step before have ended.
                            plgpu.barrier_arrive(used.at[lax.rem(step + stages - 1, stages)])
                    return ahead

                lax.fori_loop(0, steps, one, affine(0))
                return sums_ref[...]

            sums = pl.run_scoped(add_products, plgpu.ACC((ROWS, columns), jnp.float32))
            # Both warpgroups have finished with x, so its memory can take y.
            plgpu.barrier_arrive(done)
            plgpu.barrier_wait(done)
            registers.keep_rounded(x_smem.at[0], sums, x.dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(done)
            plgpu.barrier_wait(done)

            @pl.when(own == 0)
            def _store():
                out = y_ref.at[pl.ds(first_column, columns), pl.ds(first_row, 2 * ROWS)]
                plgpu.copy_smem_to_gmem(x_smem.at[0], out)
                plgpu.wait_smem_to_gmem(0)

    y = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows_of_x, n), x.dtype),
        # Blocks for the same rows of W follow each other, so that codes come from memory once.
        grid=(n // (2 * ROWS), pl.cdiv(m, columns)),
        grid_names=("tile", "tile_of_x"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        scratch_types=[
            plgpu.SMEM((stages, 2 * ROWS, INPUTS // 2), jnp.uint8),
            plgpu.SMEM((stages, columns, INPUTS), x.dtype, transforms=SWIZZLED),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2),
        ],
    )(jnp.pad(x, [(0, rows_of_x - m), (0, 0)]), codes, lut, scales, *([] if offsets is None else [offsets]))
    return y[:m]
