"""The CUDA product on the caller's device pointers and stream: for CUDA graphs that are captured without XLA."""

import ctypes
from collections.abc import Callable

from cuda_ffi import registration

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = (
    *(_POINTER, _SIZE),  # x, M
    *(_POINTER, _POINTER, _POINTER, _POINTER),  # codes, lut, scales, offsets
    *(_POINTER, _SIZE, _SIZE),  # y, N, K
    *(_SIZE, ctypes.c_int, _POINTER),  # group_size, one_table, stream
)


def launcher() -> Callable[..., None]:
    """launch(x, M, codes, lut, scales, offsets, y, N, K, group_size, one_table, stream): y [M, N] = x [M, K] W^T.

    Pointers are addresses on the device, 0 for absent `offsets`. x, y, lut, scales and offsets are bfloat16, codes have
    4 bits and lie as layout.py states, and K is a multiple of 32. launch raises RuntimeError if CUDA refuses it.

    Raises:
      RuntimeError: the library can't be used; the sentence says why.
    """
    function = registration.register("cuda").any4_cuda_lut_product_plain
    function.argtypes, function.restype = _ARGUMENTS, ctypes.c_int

    def launch(*arguments: int) -> None:
        error = function(*arguments)
        if error:
            raise RuntimeError(f"the launch of the CUDA product failed with error {error}; look it up in cudaError_t")

    return launch
