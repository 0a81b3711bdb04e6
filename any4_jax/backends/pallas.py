"""The Pallas products of `pallas_kernels` as a backend: NVIDIA GPUs with no compiler on the user's machine.

They read weights as they are stored; preparing one changes nothing. Triton's kernels are for jax 0.10 to 0.12 and
compute capability 8.0 and newer; those of Mosaic GPU, which take over where wgmma pays, for Hopper.
"""

import functools
import math
from collections.abc import Callable
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
    from pallas_kernels import device

    # First: most processes have no such GPU, and importing the kernels takes a second.
    reason = device.why_not()
    if reason is not None:
        return reason
    from pallas_kernels.lut_product import why_not

    scales, offsets = (_dtype(a) for a in (w.scales, w.offsets))
    return why_not(x.dtype, w.bits, w.group_size, w.shape[-1], w.lut.dtype, scales, offsets)


def _problem(x: Any, w: QuantizedTensor) -> Any:
    from pallas_kernels.choice import Problem
    from pallas_kernels.device import gpu_name

    (n, k), offsets = w.shape[-2:], None if w.offsets is None else _dtype(w.offsets)
    dtypes = (x.dtype, w.lut.dtype, _dtype(w.scales), offsets)
    return Problem(n, k, math.prod(x.shape[:-1]), w.bits, w.group_size, *dtypes, gpu_name() or "")


def _detail(x: Any, w: QuantizedTensor) -> str:
    from pallas_kernels.choice import choose

    choice = choose(_problem(x, w))
    return f"{choice.kernel}, {choice.reason}"


def alternatives(x: Any, w: QuantizedTensor) -> list[tuple[dict[str, Any], Callable[[jax.Array, Any], jax.Array]]]:
    """Every configuration of the chosen kernel that is worth timing: its row for tuned.json, and the product with it.

    Args:
      x: an array or ShapeDtypeStruct [M, K].
      w: a weight [N, K] that the backend supports; the products take it or others like it.
    """
    from pallas_kernels import tuning
    from pallas_kernels.lut_product import lut_product

    def product(x: jax.Array, w: QuantizedTensor, choice: Any) -> jax.Array:
        codes = w.codes if isinstance(w.codes, tuple) else (w.codes,)
        fields = dict(bits=w.bits, group_size=w.group_size, choice=choice)
        return lut_product(x, codes, w.lut, w.scales, w.offsets, **fields)

    problem = _problem(x, w)
    choices = tuning.candidates(problem)
    return [(tuning.row(problem, choice), functools.partial(product, choice=choice)) for choice in choices]


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


PALLAS = Backend(
    name="pallas",
    supports=_supports,
    run=_run,
    prepare=lambda w: w,
    unprepare=lambda arrays: arrays,
    detail=_detail,
)
