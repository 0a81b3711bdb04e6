"""What the Triton kernels share: their operands, tiles of codes, and the scales of groups."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels.layout import PLANES
from pallas_kernels.triton_lookup import codes_of, halves, permuted, table_words

LOOKUPS = ("permute", "loads")


@dataclasses.dataclass(frozen=True)
class Weight:
    """A LUT-coded matrix [N, K] in the layout of layout.py: arrays or, inside a kernel, refs to them.

    Attributes:
      codes: the planes, uint8 [N, ceil(K * width / 8)].
      lut: [N or 1, 2**bits], floating.
      scales, offsets: [N, ceil(K / G)]; uint8 scales are exponents; offsets may be None.
      bits: 2, 3, 4 or 8.
      k: K.
      group_size: G; at least K makes each row one group.
    """

    codes: tuple[Any, ...]
    lut: Any
    scales: Any
    offsets: Any
    bits: int
    k: int
    group_size: int

    @property
    def n(self) -> int:
        return self.codes[0].shape[0]

    @property
    def per_byte(self) -> int:
        """Codes that start in a byte of the first plane."""
        return 8 // PLANES[self.bits][0]

    @property
    def chunk(self) -> int:
        """Bytes of the first plane that a lane loads at a time: at most 16, all in one group."""
        return min(16, self.group_size // self.per_byte) if self.group_size < self.k else 16

    def arrays(self) -> list[Any]:
        return [*self.codes, self.lut, self.scales, *([] if self.offsets is None else [self.offsets])]

    def replaced(self, arrays: Sequence[Any]) -> "Weight":
        """The same weight with other arrays, or a kernel's refs, in place of `arrays()`."""
        planes = len(self.codes)
        return dataclasses.replace(
            self,
            codes=tuple(arrays[:planes]),
            lut=arrays[planes],
            scales=arrays[planes + 1],
            offsets=None if self.offsets is None else arrays[planes + 2],
        )


def can_permute(w: Weight, columns: int, rows: int, warps: int) -> bool:
    """Whether the lookup "permute" can decode tiles of codes [rows, columns].

    It needs 4-bit codes, a table of 16-bit floats, and a lane that holds eight neighbouring bytes of one row's codes.
    Triton gives a lane such bytes where a row takes a multiple of 16 bytes and a lane takes at least eight bytes of the
    tile.
    """
    wide_enough = rows * columns >= 8 * 32 * warps
    return w.bits == 4 and w.lut.dtype.itemsize == 2 and w.k % 32 == 0 and wide_enough


def decoder(w: Weight, rows: jax.Array, lookup: str) -> Callable[[Sequence[jax.Array], jax.Array], list[jax.Array]]:
    """The function that decodes a tile inside a kernel.

    It maps the bytes of each plane [rows, bytes] and the places of those bytes [1, bytes] to float32 table entries:
    those of the first codes of all bytes, then those of the second codes, ...

    Args:
      w: the weight, with refs.
      rows: int32 [rows], all below N.
      lookup: "permute" for 4-bit codes and tables of 16-bit floats, "loads" for all.
    """
    table_rows = rows if w.lut.shape[0] > 1 else jnp.zeros_like(rows)
    if lookup == "permute":
        words = table_words(lambda code: plt.load(w.lut.at[table_rows, jnp.full_like(rows, code)]))
        return lambda loaded, columns: list(halves(permuted(loaded[0], rows, words, "pairs", w.lut.dtype), w.lut.dtype))

    def by_loads(loaded: Sequence[jax.Array], columns: jax.Array) -> list[jax.Array]:
        spread = jnp.broadcast_to(table_rows[:, None], loaded[0].shape)
        codes = codes_of(loaded, columns, w.bits)
        return [plt.load(w.lut.at[spread, code]).astype(jnp.float32) for code in codes]

    return by_loads


def load_codes(w: Weight, rows: jax.Array, columns: jax.Array, whole: bool) -> tuple[jax.Array, ...]:
    """For each plane, the bytes with the codes of bytes `columns` of the first plane, uint8 [rows, columns].

    Bytes past K are zero.

    Args:
      whole: whether all columns lie in the row.
    """
    first = PLANES[w.bits][0]
    tiles = []
    for ref, width in zip(w.codes, PLANES[w.bits], strict=True):
        places = columns if width == first else columns * width // first
        at = ref.at[rows[:, None], places[None, :]]
        if whole:
            tiles.append(plt.load(at))
        else:
            inside = jnp.broadcast_to((places < ref.shape[1])[None, :], (rows.shape[0], columns.shape[0]))
            tiles.append(plt.load(at, mask=inside, other=0))
    return tuple(tiles)


def group_values(ref: Any, rows: jax.Array, groups: jax.Array) -> jax.Array:
    """Scales or offsets, float32 [rows, groups]; groups past the last take the last one's."""
    groups = jnp.minimum(groups, ref.shape[1] - 1)
    return plt.load(ref.at[rows[:, None], groups[None, :]]).astype(jnp.float32)
