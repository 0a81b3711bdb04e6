"""y = x W^T on Hopper for few rows of x: the warpgroups of a block share out the inputs of 64 rows of W.

Each warpgroup copies codes and inputs of its steps to shared memory by TMA some steps ahead, decodes codes to the left
operand of `wgmma`, and adds up products in float32; the warpgroups' sums are added in a fixed order.

What limits it (H100, 8192 x 8192, M = 16, 26 us of the device, 2 of them to put x in order; reading the codes alone
takes 12.6) was not profiled; decoding takes 24 instructions for eight weights, 17 of them in the pipe that starts 64 a
clock and multiprocessor. With one row of x it takes 25 us, no more than triton_gemv, but one launch more.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_registers as registers
from pallas_kernels.mosaic_registers import INPUTS, PART, ROWS, SWIZZLED


@dataclasses.dataclass(frozen=True)
class Config:
    """Attributes:
    columns: rows of x, a multiple of 8 and at least M.
    warpgroups: of a block.
    steps: of 128 inputs, that a warpgroup takes a turn; K is a multiple of them.
    stages: turns whose codes and inputs are in shared memory or under way to it.
    """

    columns: int = 16
    warpgroups: int = 4
    steps: int = 1
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
    """y [M, N] in x's dtype; see lut_product. N is a multiple of 64, K of 128 times `config.steps`; of 4 bits; all
    floating operands are bfloat16, or all float16; a group is a multiple of 128 inputs, or 64, 32, or the row."""
    (m, k), n = x.shape, codes.shape[0]
    columns, warpgroups, steps, stages = config.columns, config.warpgroups, config.steps, config.stages
    turns = k // (INPUTS * steps)

    def kernel(x_ref, codes_ref, lut_ref, scales_ref, *refs):
        (*offsets_refs, y_ref), scratch = refs[: 1 + (offsets is not None)], refs[1 + (offsets is not None) :]
        codes_smem, x_smem, sums_smem, arrived, done = scratch
        own = lax.axis_index("warpgroup")
        rows = pl.ds(lax.axis_index("tile") * ROWS, ROWS)
        # Turn i of this warpgroup is turn i * warpgroups + own of all.
        count = (turns - own + warpgroups - 1) // warpgroups

        def fetch(i, slot):
            turn, barrier = i * warpgroups + own, arrived.at[own * stages + slot]
            bytes_ = pl.ds(turn * (steps * INPUTS // 2), steps * INPUTS // 2)
            plgpu.copy_gmem_to_smem(codes_ref.at[rows, bytes_], codes_smem.at[own, slot], barrier)
            inputs = pl.ds(turn * (steps * INPUTS), steps * INPUTS)
            # Rows behind the last of x arrive as zeros.
            plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(0, columns), inputs], x_smem.at[own, slot], barrier)

        for i in range(stages):
            pl.when(i < count)(functools.partial(fetch, i, i))

        words = registers.table_words(lut_ref.at[rows] if lut_ref.shape[0] > 1 else lut_ref)

        def affine(i):
            # A warpgroup without a turn of its own still loads, where there is something to load.
            first = jnp.minimum(i * warpgroups + own, turns - 1) * steps
            return [
                [registers.group_pairs(ref.at[rows], first + s, group_size) for ref in (scales_ref, *offsets_refs)]
                for s in range(steps)
            ]

        def add_products(sums_ref):
            def turn(i, pairs):
                slot = lax.rem(i, stages)
                ahead = affine(jnp.minimum(i + 1, count - 1))
                plgpu.barrier_wait(arrived.at[own * stages + slot])
                for s, part in itertools.product(range(steps), range(INPUTS // PART)):
                    scales, *offset = pairs[s]
                    tile = codes_smem.at[own, slot, :, pl.ds(s * INPUTS // 2, INPUTS // 2)]
                    w = registers.dequantized(tile, part, words, scales, offset[0] if offset else None, x.dtype)
                    inputs = x_smem.at[own, slot, :, pl.ds(s * INPUTS + part * PART, PART)]
                    plgpu.wgmma(sums_ref, w, inputs.transpose((1, 0)))
                    plgpu.wgmma_wait(1)
                    if s + part == 0:
                        # Now the products of the turn before are done.
                        free = lax.rem(i + stages - 1, stages)
                        pl.when((i > 0) & (i - 1 + stages < count))(functools.partial(fetch, i - 1 + stages, free))
                return ahead

            lax.fori_loop(0, count, turn, affine(0))
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
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        scratch_types=[
            plgpu.SMEM((warpgroups, stages, ROWS, steps * INPUTS // 2), jnp.uint8),
            plgpu.SMEM((warpgroups, stages, columns, steps * INPUTS), x.dtype, transforms=SWIZZLED),
            plgpu.SMEM((warpgroups, columns, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=warpgroups * stages),
            plgpu.Barrier(num_arrivals=warpgroups),
        ],
    )(jnp.pad(x, [(0, -m % 8 if m > 8 else 0), (0, 0)]), codes, lut, scales, *([] if offsets is None else [offsets]))
