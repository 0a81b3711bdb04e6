"""The CUDA product on device pointers and a stream of the caller's: for graphs that are captured without XLA."""

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

    Pointers are addresses on the device, `offsets` 0 where there are none; x, y, lut, scales and offsets are bfloat16,
    codes 4 bits as layout.py has them, K a multiple of 32. It raises RuntimeError where the launch fails.

    Raises:
      RuntimeError: the library can't be used, in words.
    """
    function = registration.register("cuda").any4_cuda_lut_product_plain
    function.argtypes, function.restype = _ARGUMENTS, ctypes.c_int

    def launch(*arguments: int) -> None:
        error = function(*arguments)
        if error:
            raise RuntimeError(f"the CUDA product's launch gave error {error}; its meaning is in cudaError_t")

    return launch
