"""What a lane of a Mosaic GPU kernel does for which Pallas has no operation: addresses, loads, stores and PTX, in MLIR.

These functions run while a kernel is lowered, inside `plgpu.inline_mgpu`.
"""

from collections.abc import Sequence
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.extend.mlir import ir

llvm, arith, vector = utils.llvm, utils.arith, utils.vector


def i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def constant(value: int) -> ir.Value:
    """A constant of 32 bits, given as an unsigned number."""
    return utils.c(value - (1 << 32) if value >> 31 else value, i32())


def place() -> tuple[ir.Value, ir.Value, ir.Value]:
    """(warp of the warpgroup, g, t), where the lane is 4g + t."""
    thread = arith.remui(mgpu.thread_idx(), constant(128))
    lane = arith.remui(thread, constant(32))
    four = constant(4)
    return arith.divui(thread, constant(32)), arith.divui(lane, four), arith.remui(lane, four)


def rows_of_lane() -> tuple[ir.Value, ir.Value]:
    """The two of the warpgroup's 64 rows that a lane holds: 16 warp + g, and 8 rows on."""
    warp, g, _ = place()
    row = arith.addi(arith.muli(warp, constant(16)), g)
    return row, arith.addi(row, constant(8))


def address(ref: ir.Value, row: ir.Value, column: ir.Value) -> ir.Value:
    """The address of an element of a memref with two axes and static strides."""
    kind = ir.MemRefType(ref.type)
    strides, _ = kind.get_strides_and_offset()
    size = utils.bytewidth(kind.element_type)
    i64 = ir.IntegerType.get_signless(64)
    offset = utils.c(0, i64)
    for index, stride in zip((row, column), strides, strict=True):
        offset = arith.addi(offset, arith.muli(arith.extsi(i64, index), utils.c(stride * size, i64)))
    return utils.getelementptr(utils.memref_ptr(ref), [offset], ir.IntegerType.get_signless(8))


def load(ref: ir.Value, row: ir.Value, column: ir.Value, kind: ir.Type, alignment: int) -> ir.Value:
    return llvm.load(kind, address(ref, row, column), alignment=alignment)


def load_words(ref: ir.Value, row: ir.Value, column: ir.Value) -> list[ir.Value]:
    """Four words from an address that is a multiple of 16."""
    loaded = load(ref, row, column, ir.VectorType.get((4,), i32()), 16)
    return [element(loaded, i) for i in range(4)]


def store(ref: ir.Value, row: ir.Value, column: ir.Value, value: ir.Value) -> None:
    llvm.store(value, address(ref, row, column), alignment=utils.bytewidth(value.type))


def element(of: ir.Value, i: int) -> ir.Value:
    return vector.extract(of, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def permute(low: ir.Value, high: ir.Value, selector: int) -> ir.Value:
    (word,) = inline("prmt.b32 $0, $1, $2, $3;", [low, high, constant(selector)], results=1)
    return word


def inline(text: str, operands: Sequence[ir.Value], *, results: int) -> list[ir.Value]:
    """The 32-bit results of a piece of PTX, whose operands have 32 bits too."""
    constraints = ",".join(["=&r"] * results + ["r"] * len(operands))
    kind = i32() if results == 1 else ir.Type.parse(f"!llvm.struct<({', '.join(['i32'] * results)})>")
    returned: Any = llvm.inline_asm(kind, list(operands), text, constraints)
    if results == 1:
        return [returned]
    return [llvm.extractvalue(i32(), returned, [i]) for i in range(results)]


def store_transposed(ref: ir.Value, offset: ir.Value, pairs: Sequence[ir.Value]) -> None:
    """Stores four 8 x 8 matrices of 16-bit values to shared memory, transposed.

    Args:
      offset: bytes from the beginning of `ref` to where column j of matrix i goes, in lane 8 i + j.
      pairs: of each matrix, the lane's two values of a row, in 32 bits.
    """
    address = arith.addi(llvm.ptrtoint(i32(), utils.memref_ptr(ref)), offset)
    text = "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};"
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [address, *pairs], text, "r,r,r,r,r,~{memory}", has_side_effects=True)
