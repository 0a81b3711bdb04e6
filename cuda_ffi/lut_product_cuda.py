"""Products with LUT-coded weights on NVIDIA GPUs, over plain arrays in the layout of layout.py."""

import ctypes
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import registration
from cuda_ffi.folding import fold_rows
from cuda_ffi.layout import PLANES
from cuda_ffi.lut_product import Matrix

PRODUCT = "any4_cuda_lut_product"
DEQUANTIZE = "any4_cuda_lut_dequantize"
OPERANDS = 6

MOST_ROWS = 64
"""The most rows of x for which a weight that `is_fast` is decoded in registers, once for each 32 rows. With more rows a
kernel decodes W to memory, and XLA multiplies; on an H100 both ways cost about the same at this limit.

A weight that `is_wide` needs no dense W on Hopper: another kernel takes it from 33 rows on, or from 9 if it isn't
`is_fast`.
"""

MOST_COLUMNS = 24
"""The same limit for other weights, which are decoded once for each eight columns of work: a row of x is as many
columns as there are groups in 128 inputs."""

# The beginnings of jax's names of GPUs of compute capability 9.0.
_HOPPER = ("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200", "NVIDIA H800", "NVIDIA H20")
# A lane decodes 32 inputs; rows of W whose length is no multiple of that are filled up, in a copy.
_UNIT = 32
# Inputs that a warp takes at a time.
_TILE = 128
# A group size that no row reaches.
_WHOLE_ROW = 2**30


@dataclasses.dataclass(frozen=True)
class StackedMatrix(Matrix):
    """One matrix of a stack, read where it lies: every array has an axis of L matrices before those of Matrix.

    Attributes:
      index: which matrix, int32 [] on the device; a number outside 0 to L - 1 stands for the nearest one.
    """

    index: jax.Array


def why_not(x_dtype, bits: int, group_size: int, k: int, lut_dtype, scale_dtype, offset_dtype) -> str | None:
    """None if `lut_products` takes operands of these dtypes and sizes, else the reason in words.

    Args:
      k: the inputs of the weight; a group_size of at least k means one group a row.
      offset_dtype: None if there are no offsets.
    """
    if x_dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x_dtype}, its tensor cores take bfloat16 and float16"
    if bits not in (2, 3, 4, 8):
        return f"codes have {bits} bits, it takes 2, 3, 4 and 8"
    held = (x_dtype, jnp.int8) if x_dtype == jnp.bfloat16 else (jnp.bfloat16, jnp.float16, jnp.int8)
    if lut_dtype not in held:
        return f"the table is {lut_dtype}, it needs one that {x_dtype} holds"
    if group_size < k and (group_size < 16 or group_size & (group_size - 1)):
        return f"groups have {group_size} inputs, it takes powers of two from 16 on, or the whole row"
    stored = (jnp.bfloat16, jnp.float16, jnp.float32)
    if scale_dtype not in (*stored, jnp.uint8) or (offset_dtype is not None and offset_dtype not in stored):
        return f"scales are {scale_dtype}, offsets {offset_dtype}; it takes bfloat16, float16, float32, and e8m0 scales"
    if k == 0:
        return "the weight has no inputs"
    return None


def is_fast(matrix: Matrix, x_dtype, k: int, bits: int, group_size: int) -> bool:
    """Whether a matrix of k inputs has 4-bit codes and suits the kernel that decodes it once for 32 rows of x.

    Raises:
      RuntimeError: the library, which decides, can't be used.
    """
    return bits == 4 and _takes("turns", matrix, x_dtype, k, bits, group_size)


def is_wide(matrix: Matrix, x_dtype, k: int, bits: int, group_size: int) -> bool:
    """Whether Hopper's kernel for many rows of x takes a matrix of k inputs.

    Raises:
      RuntimeError: the library, which decides, can't be used.
    """
    return _takes("wide", matrix, x_dtype, k, bits, group_size)


def _takes(kernel: str, matrix: Matrix, x_dtype, k: int, bits: int, group_size: int) -> bool:
    """What csrc/cuda/lut_form.h says of a kernel."""
    function = getattr(registration.register("cuda"), f"any4_cuda_is_for_{kernel}")
    function.argtypes = (*[ctypes.c_char_p] * 3, *[ctypes.c_int64] * 4)
    offsets = "" if matrix.offsets is None else matrix.offsets.dtype.name
    names = (jnp.dtype(x_dtype).name, matrix.scales.dtype.name, offsets)
    return bool(function(*(name.encode() for name in names), bits, group_size, matrix.codes[0].shape[-2], k))


def on_hopper() -> bool:
    """Whether programs are lowered for compute capability 9.0, by the abstract mesh's device or this process's."""
    named = jax.sharding.get_abstract_mesh().abstract_device
    if named is not None:
        return named.device_kind.startswith(_HOPPER)
    return jax.default_backend() == "gpu" and jax.devices()[0].compute_capability == "9.0"


def lut_products(x: jax.Array, matrices: Sequence[Matrix], *, bits: int, group_size: int) -> tuple[jax.Array, ...]:
    """y = x W^T [M, N] of each matrix, in x's dtype, accumulated in float32.

    With few rows of x (see MOST_ROWS) kernels decode codes in registers, so there is no dense W in memory, and apply
    scales and offsets to the float32 sums of a group's products. One call does all matrices; each gets the same bits as
    alone. On Hopper a weight that `is_wide` is decoded in registers for any number of rows. From 33 rows on, or 9 if it
    isn't `is_fast`, entry * scale + offset is then rounded once to x's dtype; for x of float16, a table, scales and
    offsets of bfloat16 are rounded to float16 first. Under vmap over x alone it stays one call, with more rows; over
    weights it becomes a loop that reads each where it lies.

    Args:
      x: [M, K], bfloat16 or float16.
      matrices: at least one Matrix or StackedMatrix, each [N, K] with its own N. Tables have x's dtype, or are int8, or
        bfloat16 while x is float16, to which they are then rounded; 8-bit ones are arithmetic ramps.
      bits: of the codes of all matrices: 2, 3, 4 or 8.
      group_size: of all matrices: a power of two that is at least 16, or any number from K on.

    Raises:
      ValueError: the operands are none of these; the sentence says what is wrong.
      RuntimeError: the library can't be used; `registration.why_not("cuda")` says why without raising.
    """
    for matrix in matrices:
        offsets = None if matrix.offsets is None else matrix.offsets.dtype
        reason = why_not(x.dtype, bits, group_size, x.shape[-1], matrix.lut.dtype, matrix.scales.dtype, offsets)
        if reason is not None:
            raise ValueError(f"{reason}; use another backend")
    registration.register("cuda")
    form = (x.dtype, x.shape[-1], bits, group_size)
    fast = tuple(is_fast(matrix, *form) for matrix in matrices)
    hopper = on_hopper()
    wide = tuple(hopper and is_wide(matrix, *form) for matrix in matrices)
    call = _call(bits, group_size if group_size < x.shape[-1] else _WHOLE_ROW, fast, wide)
    return call(x, *(operand for matrix in matrices for operand in _operands(matrix)))


def _operands(matrix: Matrix) -> tuple[jax.Array, ...]:
    """OPERANDS arrays, all but the last of them stacks; an array of no elements takes the place of an absent one."""
    high = matrix.codes[1] if len(matrix.codes) > 1 else None
    arrays = [
        array if array is None or isinstance(matrix, StackedMatrix) else array[None]
        for array in (matrix.codes[0], high, matrix.lut, matrix.scales, matrix.offsets)
    ]
    index = matrix.index if isinstance(matrix, StackedMatrix) else jnp.zeros(0, jnp.int32)
    absent = (jnp.uint8, jnp.uint8, jnp.bfloat16, jnp.bfloat16, jnp.bfloat16)
    return (*(jnp.zeros(0, d) if a is None else a for a, d in zip(arrays, absent, strict=True)), index)


@functools.cache
def _call(bits: int, group_size: int, fast: tuple[bool, ...], wide: tuple[bool, ...]):
    """The products of (x, *operands) with their rule for vmap, which may add rows."""
    attributes = {"bits": np.int64(bits), "group_size": np.int64(group_size)}

    def call(x, *operands):
        short = -x.shape[1] % _UNIT
        matrices = [operands[i : i + OPERANDS] for i in range(0, len(operands), OPERANDS)]
        if short:
            x = jnp.pad(x, [(0, 0), (0, short)])
            matrices = [_filled(matrix, x.shape[1], bits) for matrix in matrices]
        rows = x.shape[0]
        columns = rows * max(1, _TILE // group_size)
        few = [rows <= MOST_ROWS if quick else columns <= MOST_COLUMNS for quick in fast]
        decoded = [any(reasons) for reasons in zip(few, wide, strict=True)]
        direct = [matrix for matrix, in_registers in zip(matrices, decoded, strict=True) if in_registers]
        outs = [jax.ShapeDtypeStruct((rows, codes.shape[1]), x.dtype) for codes, *_ in direct]
        ys = iter(jax.ffi.ffi_call(PRODUCT, outs)(x, *(a for m in direct for a in m), **attributes) if direct else ())
        return tuple(
            next(ys) if in_registers else dense(x, m) for m, in_registers in zip(matrices, decoded, strict=True)
        )

    def dense(x, matrix):
        out = jax.ShapeDtypeStruct((matrix[0].shape[1], x.shape[1]), x.dtype)
        (w,) = jax.ffi.ffi_call(DEQUANTIZE, [out])(*matrix, **attributes)
        y = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return y.astype(x.dtype)

    return fold_rows(call, _stacked)


def _filled(matrix: Sequence[jax.Array], inputs: int, bits: int) -> tuple[jax.Array, ...]:
    """A matrix's operands, its rows filled up with zero codes to `inputs`; of a stack, the one that `index` names."""
    *arrays, index = matrix
    if index.size:
        arrays = [jax.lax.dynamic_index_in_dim(a, jnp.maximum(index, 0)) if a.size else a for a in arrays]
        index = jnp.zeros(0, jnp.int32)
    for i, width in enumerate(PLANES[bits]):
        more = inputs * width // 8 - arrays[i].shape[-1]
        arrays[i] = jnp.pad(arrays[i], [(0, 0), (0, 0), (0, more)])
    return (*arrays, index)


def _stacked(size: int, batched: Sequence[bool], operands: Sequence[jax.Array]) -> tuple[list[bool], list[jax.Array]]:
    """Batches of weights as stacks, so that a loop runs over indices and not over the weights themselves."""
    flags, stacks = list(batched), list(operands)
    for first in range(0, len(operands), OPERANDS):
        index = first + OPERANDS - 1
        if not any(batched[first:index]):
            continue
        whole = [i for i in range(first, index) if operands[i].size]
        length = operands[first].shape[1 if batched[first] else 0]
        for i in whole:
            array = operands[i] if batched[i] else jnp.broadcast_to(operands[i], (size, *operands[i].shape))
            stacks[i], flags[i] = array.reshape(size * length, *array.shape[2:]), False
        within = jnp.clip(operands[index], 0, length - 1) if operands[index].size else 0
        stacks[index], flags[index] = jnp.arange(size, dtype=jnp.int32) * length + within, True
    return flags, stacks
