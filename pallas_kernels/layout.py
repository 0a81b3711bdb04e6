"""How a LUT-coded weight [N, K] lies in memory. Kernels read what checkpoints store: nothing is rearranged for them.

    W[n, k] = lut[n or 0, code[n, k]] * scales[n, k // G] + offsets[n, k // G]

Codes are uint8 arrays whose bits run on along a row, from the lowest bits of a byte to the highest: with 4 bits, input
2i is the low half of byte i and input 2i + 1 the high half. Codes of 3, 5 and 6 bits are two such arrays, `PLANES`, the
first of which holds the low bits of all codes. A row takes whole bytes, ceil(K * width / 8) of them, with zeros after
its last code. Rows follow each other without gaps, so a row may begin at any address.

`lut` [N or 1, 2**bits], `scales` and `offsets` [N, ceil(K / G)] are row-major. Scales in uint8 are exponents,
2^(e - 127).
"""

import numpy as np

PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""How many bits of a code each plane holds, the low bits first; by the bits of a code."""


def unpack(planes: tuple[np.ndarray, ...], bits: int, count: int) -> np.ndarray:
    """The first `count` codes of each row, uint8 [..., count], from planes uint8 [..., bytes]; for tests of kernels."""
    codes, low = np.zeros((*planes[0].shape[:-1], count), np.uint8), 0
    for plane, width in zip(planes, PLANES[bits], strict=True):
        stream = np.unpackbits(plane, axis=-1, bitorder="little")[..., : count * width]
        digits = stream.reshape(*codes.shape, width)
        codes |= (digits << np.arange(low, low + width, dtype=np.uint8)).sum(-1, dtype=np.uint8)
        low += width
    return codes
