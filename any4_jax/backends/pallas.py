"""The Pallas products of `pallas_kernels` as a backend: NVIDIA GPUs with no compiler on the user's machine.

They read weights as they are stored; preparing one changes nothing. Triton's kernels are for jax 0.10 to 0.12 and
compute capability 8.0 and newer; those of Mosaic GPU, which take over where wgmma pays, for Hopper.
"""

from typing import Any

import jax
import jax.numpy as jnp

from any4_jax import weights
from any4_jax.backends.base import Backend
from any4_jax.weights import QuantizedTensor


def _supports(x: Any, w: QuantizedTensor, platform: str) -> str | None:
    if platform != "cuda":
        return f"it runs on cuda, not on {platform}"
    if jax.__version_info__ >= (0, 13):
        return f"jax {jax.__version__} may lack Pallas-Triton, which later versions than 0.12 are to remove"
    from pallas_kernels.device import gpu_name

    if gpu_name() is None:
        return "no NVIDIA GPU is attached, nor named by an abstract device"
    from pallas_kernels.lut_product import why_not

    scales, offsets = (_dtype(a) for a in (w.scales, w.offsets))
    return why_not(x.dtype, w.bits, w.group_size, w.shape[-1], w.lut.dtype, scales, offsets)


def _dtype(stored: Any) -> Any:
    """Of an array; quantized scales are decoded to float32 for each product."""
    return jnp.dtype(jnp.float32) if isinstance(stored, QuantizedTensor) else getattr(stored, "dtype", None)


def _run(x: jax.Array, w: QuantizedTensor) -> jax.Array:
    # A rule for vmap and nothing of CUDA: each package of kernels stands alone, so it is borrowed here.
    from cuda_ffi.folding import fold_rows
    from pallas_kernels.lut_product import lut_product

    @fold_rows
    def call(x, *operands):
        codes, (lut, scales, *offsets) = operands[:planes], operands[planes:]
        return lut_product(x, codes, lut, scales, offsets[0] if offsets else None, bits=w.bits, group_size=w.group_size)

    codes = w.codes if isinstance(w.codes, tuple) else (w.codes,)
    planes = len(codes)
    scales, offsets = (weights.dequantize(a) if isinstance(a, QuantizedTensor) else a for a in (w.scales, w.offsets))
    return call(x, *codes, w.lut, scales, *([] if offsets is None else [offsets]))


PALLAS = Backend(name="pallas", supports=_supports, run=_run, prepare=lambda w: w, unprepare=lambda arrays: arrays)
