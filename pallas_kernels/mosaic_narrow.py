"""y = x W^T on Hopper for few rows of x: the warpgroups of a block split the inputs of 64 rows of W.

In a turn, each of `warpgroups` warpgroups takes a step of 128 inputs: it decodes codes to the left operand of `wgmma`
and adds up products in float32. One more warpgroup copies; up to `stages` turns are in shared memory or on their way
there. Where warpgroups = 2:

    global memory   codes, x                     tables, scales, offsets                     y
                      |                            | loads, of scales a turn ahead           ^
    copy              | warpgroup 2, TMA           |                                         |
                      v                            v                                         |
    shared memory   stage s, step 2 turn ----->  warpgroup 0: decode, wgmma --> sums [0] --+ |
                             step 2 turn + 1 ->  warpgroup 1: decode, wgmma --> sums [1] --+-+ both add, in order

A step is two parts of 64 inputs; a part is decoded while the products of the part before are under way. `arrived[s]`
completes when the copies of a turn are there; `used[s]` when all warpgroups have ended the products of that turn, which
each reports in the middle of the next; `done` when all sums are in shared memory.

What limits it (H100, 8192 x 8192, 24 us of the device for M = 1 and 25 for M = 16; reading the codes alone takes 12.6):
decoding. Of the 300 instructions for 64 weights of a lane, 190 are for the pipe that starts one every other clock. They
would take 14 us if it were never idle; it is busy for 62 % of the clocks (Nsight Compute), with four warps a scheduler.
Six took longer, since they had too few registers. A matrix of fewer than 64 rows per multiprocessor leaves some idle.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_registers as registers
from pallas_kernels.mosaic_registers import INPUTS, PART, ROWS, SWIZZLED


@dataclasses.dataclass(frozen=True)
class Config:
    """How a block works.

    Attributes:
      columns: rows of x that it takes, a multiple of 8 and at least M.
      warpgroups: the warpgroups that decode and multiply; in a turn, each takes a step of 128 inputs.
      stages: turns whose codes and inputs are in shared memory or on their way there, at least 2.
    """

    columns: int = 16
    warpgroups: int = 4
    stages: int = 4


def lut_product_narrow(
    x: jax.Array,
    codes: jax.Array,
    lut: jax.Array,
    scales: jax.Array,
    offsets: jax.Array | None,
    group_size: int,
    config: Config,
) -> jax.Array:
    """y [M, N] in x's dtype; see lut_product.

    N is a multiple of 64 and K of 128. Codes have 4 bits. Floating operands are all bfloat16 or all float16. A group is
    a multiple of 128 inputs, or 64, 32, or the row.
    """
    (m, k), n = x.shape, codes.shape[0]
    columns, steps = config.columns, k // INPUTS
    warpgroups = min(config.warpgroups, steps)
    turns = pl.cdiv(steps, warpgroups)
    stages = min(config.stages, turns)

    def kernel(x_ref, codes_ref, lut_ref, scales_ref, *refs):
        (*offsets_refs, y_ref), scratch = refs[: 1 + (offsets is not None)], refs[1 + (offsets is not None) :]
        codes_smem, x_smem, sums_smem, arrived, used, done = scratch
        own = lax.axis_index("warpgroup")
        rows = pl.ds(lax.axis_index("tile") * ROWS, ROWS)

        @pl.when(own == warpgroups)
        def _copy():
            # What lies past the last input or row of x arrives as zeros. jax would refuse that slice if it saw the 0.
            first_of_x = jnp.minimum(own, 0)

            def fetch(turn, slot):
                for i in range(warpgroups):
                    bytes_ = pl.ds((turn * warpgroups + i) * (INPUTS // 2), INPUTS // 2)
                    plgpu.copy_gmem_to_smem(codes_ref.at[rows, bytes_], codes_smem.at[slot, i], arrived.at[slot])
                inputs = x_ref.at[pl.ds(first_of_x, columns), pl.ds(turn * warpgroups * INPUTS, warpgroups * INPUTS)]
                plgpu.copy_gmem_to_smem(inputs, x_smem.at[slot], arrived.at[slot])

            pl.loop(0, stages)(lambda turn: fetch(turn, turn))
            # In their first turn, the others give back the last stage, which they haven't had yet.
            plgpu.barrier_wait(used.at[stages - 1])

            @pl.loop(0, turns - stages)
            def _(turn):
                slot = lax.rem(turn, stages)
                plgpu.barrier_wait(used.at[slot])
                fetch(turn + stages, slot)

        @pl.when(own < warpgroups)
        def _compute():
            words = registers.table_words(lut_ref.at[rows] if lut_ref.shape[0] > 1 else lut_ref)

            def affine(turn):
                # A warpgroup without a step in the last turn still loads: the scales of the last step.
                step = jnp.minimum(turn * warpgroups + own, steps - 1)
                return [registers.group_pairs(ref.at[rows], step, group_size) for ref in (scales_ref, *offsets_refs)]

            def add_products(sums_ref):
                def one(turn, pairs):
                    slot = lax.rem(turn, stages)
                    ahead = affine(turn + 1)
                    plgpu.barrier_wait(arrived.at[slot])
                    scales, *offset = pairs
                    for part in range(INPUTS // PART):
                        # Meanwhile, the products of the part before are under way.
                        tile = codes_smem.at[slot, own]
                        w = registers.dequantized(tile, part, words, scales, offset[0] if offset else None, x.dtype)
                        inputs = x_smem.at[slot, :, pl.ds(own * INPUTS + part * PART, PART)]
                        plgpu.wgmma(sums_ref, w, inputs.transpose((1, 0)))
                        plgpu.wgmma_wait(1)
                        if part == 0:
                            # Now the products of the turn before have ended.
                            plgpu.barrier_arrive(used.at[lax.rem(turn + stages - 1, stages)])
                    return ahead

                # In the last turn, some warpgroups may have no step.
                lax.fori_loop(0, (steps - own + warpgroups - 1) // warpgroups, one, affine(0))
                return sums_ref[...]

            sums = pl.run_scoped(add_products, plgpu.ACC((ROWS, columns), jnp.float32))
            registers.keep_transposed(sums_smem.at[own], sums)
            plgpu.barrier_arrive(done)
            plgpu.barrier_wait(done)
            registers.store_total(sums_smem, y_ref.at[:, rows], warpgroups, m, x.dtype)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=(n // ROWS,),
        grid_names=("tile",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        scratch_types=[
            plgpu.SMEM((stages, warpgroups, ROWS, INPUTS // 2), jnp.uint8),
            plgpu.SMEM((stages, columns, warpgroups * INPUTS), x.dtype, transforms=SWIZZLED),
            plgpu.SMEM((warpgroups, columns, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=warpgroups + 1, num_barriers=stages),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=warpgroups),
        ],
    )(jnp.pad(x, [(0, -m % 8 if m > 8 else 0), (0, 0)]), codes, lut, scales, *([] if offsets is None else [offsets]))
