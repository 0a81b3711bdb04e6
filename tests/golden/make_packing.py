"""Writes packing.npz: codes of every width and their bytes, in the order that checkpoints and kernels rely on.

Plain loops over bits, independent of the library, so that a mistake there can't hide here. Run it from anywhere:
`python tests/golden/make_packing.py`. A file that changes means that every checkpoint ever written is misread.
"""

from pathlib import Path

import numpy as np

PLANES = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 8: [8]}
LENGTHS = (1, 2, 3, 7, 8, 9, 17, 32)
ROWS = 3


def plane_bytes(codes: list[int], low: int, width: int) -> list[int]:
    """The bytes of one row in the plane that holds bits low .. low + width - 1 of its codes."""
    stored = [0] * -(-len(codes) * width // 8)
    for k, code in enumerate(codes):
        for bit in range(width):
            place = k * width + bit
            stored[place // 8] |= (code >> (low + bit) & 1) << (place % 8)
    return stored


def main() -> None:
    rng = np.random.default_rng(4)
    arrays = {}
    for bits, widths in PLANES.items():
        for length in LENGTHS:
            codes = rng.integers(0, 2**bits, (ROWS, length), dtype=np.uint8)
            arrays[f"codes_{bits}_{length}"] = codes
            low = 0
            for index, width in enumerate(widths):
                rows = [plane_bytes([int(c) for c in row], low, width) for row in codes]
                arrays[f"plane_{bits}_{length}_{index}"] = np.array(rows, np.uint8)
                low += width
    np.savez_compressed(Path(__file__).parent / "packing.npz", **arrays)


if __name__ == "__main__":
    main()
