"""Decodes a warpgroup's codes to the left operand of `wgmma`, in registers: Mosaic GPU has no operation for that.

A step is 64 rows of W by 128 inputs, and is decoded in two parts of 64 inputs. Lane 4g + t of warp w takes rows 16w + g
and 16w + g + 8, and of each 16 inputs numbers 2t, 2t + 1, 2t + 8 and 2t + 9, as `wgmma` requires: byte t of every four
bytes of codes. So the four lanes of a row load the same words, and each gathers its byte from four of them. This takes
an eighth of the instructions of decoding; in return, the copy engine reads x in the order in which it is stored.

The functions with a `ctx` run while the kernel is lowered and emit MLIR for one lane.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir

from pallas_kernels import mosaic_lane as lane

ROWS, INPUTS, PART = 64, 128, 64
# The layout of an array [64] of which each lane has the entries of its two rows.
_OF_ROWS = plgpu.Layout.WGMMA.reduce(1)
# How wgmma takes its right operand from shared memory: rows of x, with 64 values of 16 bits next to each other.
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def table_words(lut_ref: Any) -> list[jax.Array]:
    """Eight int32 [64]: words of the low bytes of entries 4i to 4i + 3, then words of their high bytes.

    Args:
      lut_ref: in global memory, [64, 16], or [1, 16] for a single table, of a 16-bit dtype.
    """
    one = lut_ref.shape[0] == 1
    returned = [plgpu.ShapeDtypeStruct((ROWS,), jnp.int32, _OF_ROWS)] * 8

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=returned)
    def load(ctx, ref):
        rows = []
        for row in lane.rows_of_lane():
            at = lane.constant(0) if one else row
            words = [word for first in (0, 8) for word in lane.load_words(ref, at, lane.constant(first))]
            pairs = list(zip(words[::2], words[1::2], strict=True))
            rows.append([lane.permute(a, b, selector) for selector in (0x6420, 0x7531) for a, b in pairs])
        return [_of_rows(pair, signed=True) for pair in zip(*rows, strict=True)]

    return load(lut_ref)


def group_pairs(ref: Any, step: jax.Array, group_size: int) -> list[jax.Array]:
    """For each group of a step, int32 [64]: the rows' scales or offsets, each twice in a word.

    Args:
      ref: in global memory, [64, groups], of a 16-bit dtype.
      step: int32, the number of the step of 128 inputs.
      group_size: a multiple of 128, or 64 or 32.
    """
    count = max(1, INPUTS // group_size)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())),
        return_type=[plgpu.ShapeDtypeStruct((ROWS,), jnp.int32, _OF_ROWS)] * count,
    )
    def load(ctx, ref, first):
        groups = []
        for i in range(count):
            at = lane.arith.addi(first.registers.item(), lane.constant(i))
            values = []
            for row in lane.rows_of_lane():
                word = lane.arith.extui(lane.i32(), lane.load(ref, row, at, ir.IntegerType.get_signless(16), 2))
                values.append(lane.arith.ori(word, lane.arith.shli(word, lane.constant(16))))
            groups.append(_of_rows(values, signed=True))
        return groups

    return list(load(ref, step * count if group_size < INPUTS else step // (group_size // INPUTS)))


def dequantized(
    codes_ref: Any,
    part: int,
    words: Sequence[jax.Array],
    scales: Sequence[jax.Array],
    offsets: Sequence[jax.Array] | None,
    dtype: Any,
) -> jax.Array:
    """The weights of a step's first or second 64 inputs, `dtype` [64, 64] in the layout of wgmma's operand.

    Each is entry * scale + offset, by one fused multiply-add: rounded once.

    Args:
      codes_ref: the codes of the whole step, in shared memory, uint8 [64, 64].
      part: 0 or 1.
      words: from `table_words`.
      scales, offsets: from `group_pairs`.
      dtype: that of table, scales and offsets: bfloat16 or float16.
    """
    # One scale and offset for each 32 inputs.
    affine = [
        [of[(2 * part + i) * len(of) // 4] for of in (scales, offsets) if of is not None] for i in range(PART // 32)
    ]
    arrays = [*words, *(array for pair in affine for array in pair)]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *[_OF_ROWS] * len(arrays)),
        return_type=plgpu.ShapeDtypeStruct((ROWS, PART), dtype, plgpu.Layout.WGMMA),
    )
    def decode(ctx, ref, *operands):
        layout = mgpu.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape((ROWS, PART)), dtype=object)
        by_pair = registers.reshape(PART // 8, 2)
        bfloat16 = dtype == jnp.bfloat16
        pair_type = ir.VectorType.get((2,), ir.BF16Type.get() if bfloat16 else ir.F16Type.get())
        text = _decoding("bf16x2" if bfloat16 else "f16x2")
        # Selects byte t of the first operand and byte t of the second.
        byte = lane.arith.addi(lane.arith.muli(lane.place()[2], lane.constant(0x11)), lane.constant(0x40))
        for half, row in enumerate(lane.rows_of_lane()):
            own = [_entry(operand, half) for operand in operands]
            table, pairs = own[:8], own[8:]
            for i in range(PART // 32):
                loaded = lane.load_words(ref, row, lane.constant(part * (PART // 2) + 16 * i))
                scale, *offset = pairs[i * len(affine[i]) : (i + 1) * len(affine[i])]
                last = offset[0] if offset else lane.constant(0x80008000)  # -0, which changes no product
                for j, pair in enumerate(lane.inline(text, [byte, *loaded, *table, scale, last], results=4)):
                    by_pair[4 * i + j, half] = utils.bitcast(pair, pair_type)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return decode(codes_ref, *arrays)


def _decoding(kind: str) -> str:
    """PTX that computes four pairs of values from the selector of a lane's byte, four words that each hold such a byte,
    eight words of the table, a scale and an offset.

    PRMT picks four bytes of eight by the four nibbles of a selector, of which it reads three bits. The codes are the
    selector; their fourth bits, moved to bit 2 of each nibble, select between two results.
    """
    lines = []
    for first in (0, 2):
        lines.append(f"prmt.b32 codes, ${5 + first}, ${6 + first}, $4;")
        lines.append("and.b32 choose, codes, 0x8888;")
        lines.append("sub.s32 select, codes, choose;")
        lines.append("mad.hi.u32 choose, choose, 0x80000000, 0x3210;")
        for name, table in (("low", 9), ("high", 13)):
            lines.append(f"prmt.b32 {name}, ${table}, ${table + 1}, select;")
            lines.append(f"prmt.b32 upper, ${table + 2}, ${table + 3}, select;")
            lines.append(f"prmt.b32 {name}, {name}, upper, choose;")
        for pair, selector in ((first, "0x5140"), (first + 1, "0x7362")):
            lines.append(f"prmt.b32 ${pair}, low, high, {selector};")
            lines.append(f"fma.rn.{kind} ${pair}, ${pair}, $17, $18;")
    return "{.reg .b32 codes, select, choose, upper, low, high;\n" + "\n".join(lines) + "\n}"


def keep_transposed(ref: Any, sums: jax.Array) -> None:
    """Stores float32 [64, columns], in the layout of wgmma's sums, to [columns, 64] in shared memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA), return_type=())
    def store(ctx, ref, sums):
        rows, t = lane.rows_of_lane(), lane.place()[2]
        for tile, halves in enumerate(sums.registers.reshape(-1, 2)):
            for half, register in enumerate(halves):
                for i in range(2):
                    column = lane.arith.addi(lane.arith.muli(t, lane.constant(2)), lane.constant(8 * tile + i))
                    lane.store(ref, column, rows[half], lane.element(register, i))
        return ()

    store(ref, sums)


def keep_rounded(ref: Any, sums: jax.Array, dtype: Any) -> None:
    """Rounds float32 [64, columns], in the layout of wgmma's sums, to `dtype`, and stores it to shared memory, at
    [columns, 64 i to 64 i + 63], where i is the number of the warpgroup.

    Args:
      ref: [columns, 128], `SWIZZLED`.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(SWIZZLED), plgpu.Layout.WGMMA), return_type=())
    def store(ctx, ref, sums):
        pair_type = ir.VectorType.get((2,), ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get())
        thread = mgpu.thread_idx()
        warp, own = lane.place()[0], lane.arith.divui(thread, lane.constant(128))
        matrix = lane.arith.divui(lane.arith.remui(thread, lane.constant(32)), lane.constant(8))
        column = lane.arith.remui(thread, lane.constant(8))
        half, second = (lane.arith.remui(matrix, lane.constant(2)), lane.arith.divui(matrix, lane.constant(2)))
        # Where a lane puts a row of the transposed 8 x 8 matrix: 16 bytes of the 128 that a swizzle permutes.
        piece = lane.arith.addi(lane.arith.muli(warp, lane.constant(2)), half)
        piece = lane.arith.xori(piece, column)
        tile = lane.arith.addi(lane.arith.muli(second, lane.constant(2)), own)
        at = lane.arith.addi(lane.arith.muli(tile, lane.constant(8)), column)
        at = lane.arith.addi(lane.arith.muli(at, lane.constant(128)), lane.arith.muli(piece, lane.constant(16)))
        pairs = [utils.bitcast(lane.arith.truncf(pair_type, register), lane.i32()) for register in sums.registers.flat]
        for first in range(0, len(pairs), 4):
            lane.store_transposed(ref, lane.arith.addi(at, lane.constant(first // 4 * 4096)), pairs[first : first + 4])
        return ()

    store(ref, sums)


def store_total(sums_ref: Any, ref: Any, warpgroups: int, count: int, dtype: Any) -> None:
    """Adds up what the warpgroups kept, float32 [warpgroups, columns, 64] in shared memory, in a fixed order. Rounds
    `count` columns to `dtype` and stores them to [count, 64] in global memory. All warpgroups work together."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()), return_type=())
    def store(ctx, sums, out):
        thread = mgpu.thread_idx()
        row, first = lane.arith.remui(thread, lane.constant(ROWS)), lane.arith.divui(thread, lane.constant(ROWS))
        together = 2 * warpgroups

        def one(column):
            places = [lane.arith.addi(column, lane.constant(w * sums_ref.shape[1])) for w in range(warpgroups)]
            flat = utils.memref_fold(sums, 0, 2)
            total = lane.load(flat, places[0], row, ir.F32Type.get(), 4)
            for place in places[1:]:
                total = lane.arith.addf(total, lane.load(flat, place, row, ir.F32Type.get(), 4))
            lane.store(out, column, row, _narrowed(total, dtype))

        for begin in range(0, count, together):
            column = lane.arith.addi(first, lane.constant(begin))
            if begin + together <= count:
                one(column)
            else:
                with mgpu.when(lane.arith.cmpi(lane.arith.CmpIPredicate.slt, column, lane.constant(count))):
                    one(column)
        return ()

    store(sums_ref, ref)


def _entry(array: Any, half: int) -> ir.Value:
    """The register of an array of `_OF_ROWS` for a lane's first or second row."""
    return lane.element(array.registers.reshape(2)[half], 0)


def _of_rows(values: Sequence[ir.Value], *, signed: bool | None) -> Any:
    layout = mgpu.WGMMA_ROW_LAYOUT
    registers = np.empty(layout.registers_shape((ROWS,)), dtype=object)
    flat = registers.reshape(2)
    for half, value in enumerate(values):
        flat[half] = lane.vector.broadcast(ir.VectorType.get((1,), value.type), value)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)


def _narrowed(value: ir.Value, dtype: Any) -> ir.Value:
    if dtype is None:
        return value
    return lane.arith.truncf(ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get(), value)
