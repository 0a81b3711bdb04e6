"""A warpgroup's codes to the left operand of `wgmma`, in registers: what Mosaic GPU has no operation for.

A step is 64 rows of W by 128 inputs. Lane 4g + t of warp w takes rows 16w + g and 16w + g + 8, and of each the 32
inputs from 32t on, whose codes are 16 bytes as stored. `wgmma` wants of that lane inputs 2t, 2t + 1, 2t + 8 and 2t + 9
of each 16; which inputs of W these are is free as long as x has the same order. `reordered` puts x into that order, so
that codes are loaded 16 bytes at a time, pairs of codes become registers as they come, and no value changes lanes.

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

ROWS, INPUTS = 64, 128
# An array [64] of which each lane has the entries of its two rows.
_OF_ROWS = plgpu.Layout.WGMMA.reduce(1)


def reordered(x: jax.Array, rows: int) -> jax.Array:
    """x [M, K] with the inputs of each 128 in the order of `dequantized`, and zeros in rows up to `rows`."""
    m, k = x.shape
    ordered = x.reshape(m, k // INPUTS, 4, 8, 2, 2).transpose(0, 1, 3, 4, 2, 5).reshape(m, k)
    return jnp.pad(ordered, [(0, rows - m), (0, 0)])


def table_words(lut_ref: Any) -> list[jax.Array]:
    """Eight int32 [64]: words of the low bytes of entries 4i to 4i + 3, then of their high bytes.

    Args:
      lut_ref: in global memory, [64, 16] or, for one table, [1, 16], of a 16-bit dtype.
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


def group_pair(ref: Any, step: jax.Array, group_size: int) -> jax.Array:
    """int32 [64]: the scale or offset of each lane's inputs of a step, twice in a word.

    Where a step has several groups it differs among the four lanes of a row, so nothing but `dequantized` may use it.

    Args:
      ref: in global memory, [64, groups], a 16-bit dtype.
      step: int32, which 128 inputs.
      group_size: a multiple of 128, or 64 or 32.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())),
        return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.int32, _OF_ROWS),
    )
    def load(ctx, ref, group):
        at = group.registers.item()
        if group_size < INPUTS:
            lanes = lane.constant(group_size // 32)
            at = lane.arith.addi(at, lane.arith.divui(lane.place()[2], lanes))
        values = []
        for row in lane.rows_of_lane():
            half = lane.load(ref, row, at, ir.IntegerType.get_signless(16), 2)
            word = lane.arith.extui(lane.i32(), half)
            values.append(lane.arith.ori(word, lane.arith.shli(word, lane.constant(16))))
        return _of_rows(values, signed=True)

    first = step * (INPUTS // group_size) if group_size < INPUTS else step // (group_size // INPUTS)
    return load(ref, first)


def dequantized(
    codes_ref: Any, words: Sequence[jax.Array], scale: jax.Array, offset: jax.Array | None, dtype: Any
) -> jax.Array:
    """The weights of a step, `dtype` [64, 128] in the layout of wgmma's operand, inputs in the order of `reordered`.

    Each is entry * scale + offset in one fused multiplication and addition: rounded once.

    Args:
      codes_ref: in shared memory, uint8 [64, 64].
      words: from `table_words`.
      scale, offset: from `group_pair`.
      dtype: of table, scales and offsets: bfloat16 or float16.
    """
    arrays = [*words, scale, *([] if offset is None else [offset])]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *[_OF_ROWS] * len(arrays)),
        return_type=plgpu.ShapeDtypeStruct((ROWS, INPUTS), dtype, plgpu.Layout.WGMMA),
    )
    def decode(ctx, ref, *operands):
        layout = mgpu.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape((ROWS, INPUTS)), dtype=object)
        by_pair = registers.reshape(INPUTS // 8, 2)
        bfloat16 = dtype == jnp.bfloat16
        pair_type = ir.VectorType.get((2,), ir.BF16Type.get() if bfloat16 else ir.F16Type.get())
        text = _decoding("bf16x2" if bfloat16 else "f16x2")
        place = lane.arith.muli(lane.place()[2], lane.constant(16))
        for half, row in enumerate(lane.rows_of_lane()):
            own = [_entry(operand, half) for operand in operands]
            if offset is None:
                own.append(lane.constant(0x80008000))  # -0, which changes no product
            for i, word in enumerate(lane.load_words(ref, row, place)):
                for j, pair in enumerate(lane.inline(text, [word, *own], results=4)):
                    by_pair[4 * i + j, half] = utils.bitcast(pair, pair_type)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return decode(codes_ref, *arrays)


def _decoding(kind: str) -> str:
    """PTX from a word of eight codes, eight words of the table, scale and offset to four pairs of values.

    PRMT picks four bytes of eight by four nibbles of a selector, of which it reads three bits; the codes are the
    selector, and their fourth bits, moved to bit 2 of each nibble, select between two results.
    """
    lines = ["and.b32 select, $4, 0x77777777;", "shr.b32 choose, $4, 1;"]
    lines.append("lop3.b32 choose, choose, 0x44444444, 0x32103210, 0xEA;")  # (a & b) | c
    for half in range(2):
        for name, first in (("low", 5), ("high", 9)):
            lines.append(f"prmt.b32 {name}, ${first}, ${first + 1}, select;")
            lines.append(f"prmt.b32 upper, ${first + 2}, ${first + 3}, select;")
            lines.append(f"prmt.b32 {name}, {name}, upper, choose;")
        for pair, selector in ((2 * half, "0x5140"), (2 * half + 1, "0x7362")):
            lines.append(f"prmt.b32 ${pair}, low, high, {selector};")
            lines.append(f"fma.rn.{kind} ${pair}, ${pair}, $13, $14;")
        if half == 0:
            lines += ["shr.b32 select, select, 16;", "shr.b32 choose, choose, 16;"]
    return "{.reg .b32 select, choose, upper, low, high;\n" + "\n".join(lines) + "\n}"


def keep_transposed(ref: Any, sums: jax.Array) -> None:
    """Stores float32 [64, columns] in the layout of wgmma's sums to [columns, 64] in shared memory."""
    _store_transposed(ref, sums, ref.shape[0], None)


def store_transposed(ref: Any, sums: jax.Array, count: int, dtype: Any) -> None:
    """Stores `count` columns of float32 [64, columns], rounded to `dtype`, to [count, 64] in global memory."""
    _store_transposed(ref, sums, count, dtype)


def _store_transposed(ref: Any, sums: jax.Array, count: int, dtype: Any) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA), return_type=())
    def store(ctx, ref, sums):
        rows, t = lane.rows_of_lane(), lane.place()[2]
        for tile, halves in enumerate(sums.registers.reshape(-1, 2)):
            for half, register in enumerate(halves):
                for i in range(2):
                    column = lane.arith.addi(lane.arith.muli(t, lane.constant(2)), lane.constant(8 * tile + i))
                    value = _narrowed(lane.element(register, i), dtype)
                    if 8 * tile + 8 <= count:
                        lane.store(ref, column, rows[half], value)
                    elif 8 * tile < count:
                        with mgpu.when(lane.arith.cmpi(lane.arith.CmpIPredicate.slt, column, lane.constant(count))):
                            lane.store(ref, column, rows[half], value)
        return ()

    store(ref, sums)


def store_total(sums_ref: Any, ref: Any, warpgroups: int, count: int, dtype: Any) -> None:
    """Adds up what each warpgroup kept, float32 [warpgroups, columns, 64] in shared memory, in a fixed order, and
    stores `count` columns, rounded to `dtype`, to [count, 64] in global memory: by all warpgroups together."""

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
