"""The tensors of GGUF files: where they lie, and their values as arrays."""

import math
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from any4_jax.models.gguf_header import Entry, Header
from any4_jax.one_line import shown
from any4_jax.regular_file import check_regular

# Types that are stored as they are used; the gguf package decodes the others.
PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
QUANTIZED = (
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS"),
)


class StoredTensor(NamedTuple):
    """One tensor on disk.

    Attributes:
        path: the file that holds it.
        name: its name there.
        offset: of its first byte from the start of the file.
        shape: row-major; linears are [N, K].
        stored: the shape in bytes: the last axis holds the bytes of the blocks.
        kind: the name of its type, one of `PLAIN` and `QUANTIZED`.
    """

    path: Path
    name: str
    offset: int
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    kind: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.stored)

    def read(self) -> np.ndarray:
        """Its values: float32, float16 or bfloat16 as stored, or float32 from a quantized type.

        Raises:
            OSError, ValueError: the file is gone, or was changed after its header was read.
        """
        _refuse_shorter(self, check_regular(self.path))
        # Read, not mapped: mapped pages would count as resident memory beside the arrays that are made from them.
        raw = np.fromfile(self.path, np.uint8, self.nbytes, offset=self.offset)
        if self.kind in PLAIN:
            return raw.view(PLAIN[self.kind]).reshape(self.shape)
        import gguf

        # Damaged scales overflow here; whoever uses the values checks that they are finite.
        with np.errstate(all="ignore"):
            return gguf.quants.dequantize(raw.reshape(self.stored), gguf.GGMLQuantizationType[self.kind])


def locate(header: Header) -> dict[str, StoredTensor]:
    """Name -> tensor, for all that a header lists.

    Raises:
        ValueError: a type is not supported, a row is no whole number of blocks, or the tensors don't fill the data one
            after the other, each from a multiple of the alignment.
    """
    tensors = {name: _stored(header, name, entry) for name, entry in header.tensors.items()}
    end, before = header.start, "the header"
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        needed = _padded(end, header)
        if tensor.offset != needed:
            raise ValueError(
                f"tensor {shown(tensor.name)} of {header.path} begins at byte {tensor.offset}, and {needed} is needed, "
                f"the next multiple of {header.alignment} after {before}; fetch it again"
            )
        _refuse_shorter(tensor, header.length)
        end, before = tensor.offset + tensor.nbytes, f"tensor {shown(tensor.name)}"
    if header.length > _padded(end, header):
        raise ValueError(
            f"{header.path} has {header.length} bytes, and its data ends at {end} with {before}; fetch it again"
        )
    return tensors


def _stored(header: Header, name: str, entry: Entry) -> StoredTensor:
    import gguf

    kinds = gguf.GGMLQuantizationType
    kind = kinds(entry.kind).name if entry.kind in set(kinds) else f"of the unknown type {entry.kind}"
    if kind not in PLAIN and kind not in QUANTIZED:
        raise ValueError(
            f"tensor {shown(name)} of {header.path} is {kind}, and {', '.join((*PLAIN, *QUANTIZED))} are supported; "
            "convert it to one of them"
        )
    block, size = gguf.GGML_QUANT_SIZES[kinds(entry.kind)]
    *rows, last = entry.shape
    if last % block:
        raise ValueError(
            f"tensor {shown(name)} of {header.path} is {kind} with rows of {last} values, and a multiple of {block} is "
            "needed; convert the model again"
        )
    stored = (*rows, last // block * size)
    return StoredTensor(header.path, name, header.start + entry.offset, entry.shape, stored, kind)


def _padded(position: int, header: Header) -> int:
    return -(-position // header.alignment) * header.alignment


def _refuse_shorter(tensor: StoredTensor, length: int) -> None:
    end = tensor.offset + tensor.nbytes
    if end > length:
        raise ValueError(
            f"{tensor.path} has {length} bytes, and its tensor {shown(tensor.name)} ends at {end}; it is truncated, "
            "fetch it again"
        )
