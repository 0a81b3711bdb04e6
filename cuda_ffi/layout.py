"""How a LUT-coded weight lies in memory when a kernel of this package receives it. It is the canonical layout of
checkpoints: kernels read it as it is, so nothing is rearranged when a weight is put on a device.

- A code of 3, 5 or 6 bits is split into two planes, the low bits in the first; other widths have one (`PLANES`).
- In a plane of width b, code k of a row occupies bits b * (k mod 8/b) and up of byte k // (8/b). So a little-endian
  word of 32 bits holds 32/b consecutive codes, the first in its lowest bits.
- Each row of a plane has ceil(K * b / 8) bytes; zero codes fill up its last byte. There is no other padding: a row
  may begin at any address, and a kernel must read nothing after the last row.
- lut [N or 1, 2**bits], scales and offsets [N, ceil(K / G)] are row-major; uint8 scales are exponents, 2^(e - 127).

`unpack` states the first two rules in numpy, for tests of kernels.
"""

import numpy as np

PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""The widths of a code's bit planes, low bits first, by its number of bits."""


def unpack(planes: tuple[np.ndarray, ...], bits: int, count: int) -> np.ndarray:
    """Codes uint8 [..., count] from planes uint8 [..., ceil(count * width / 8)], one bit after another."""
    codes = np.zeros((*planes[0].shape[:-1], count), np.uint8)
    low = 0
    for plane, width in zip(planes, PLANES[bits], strict=True):
        for k in range(count):
            byte, shift = divmod(k * width, 8)
            codes[..., k] |= ((plane[..., byte] >> shift) & (2**width - 1)) << low
        low += width
    return codes
