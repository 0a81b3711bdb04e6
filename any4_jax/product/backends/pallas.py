"""The Pallas products of `pallas_kernels` as a backend: for NVIDIA GPUs, with no compiler on the user's machine.

The Triton kernels need jax 0.10 to 0.12 and compute capability 8.0 or newer. On Hopper, Mosaic GPU kernels take over
where wgmma pays.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax

from any4_jax.product.backends.base import Backend, arrays_of, dtypes_of, why_no_codes
from any4_jax.weights import QuantizedTensor, leaf_of


def _supports(x: Any, w: Any, platform: str) -> str | None:
    if platform != "cuda":
        return f"it runs on cuda, not on {platform}"
    leaf = leaf_of(w)
    if leaf is None:
        return why_no_codes(w)
    if jax.__version_info__ >= (0, 13):
        return f"jax {jax.__version__} may lack Pallas-Triton, which versions after 0.12 are to remove"
    from pallas_kernels import device

    # Asked first, since most processes have no such GPU and importing the kernels takes a second.
    reason = device.why_not()
    if reason is not None:
        return reason
    from pallas_kernels.lut_product import why_not

    return why_not(x.dtype, leaf.bits, leaf.group_size, leaf.shape[-1], *dtypes_of(leaf))


def _problem(x: Any, w: QuantizedTensor) -> Any:
    from pallas_kernels.choice import Problem
    from pallas_kernels.device import gpu_name

    n, k = w.shape[-2:]
    return Problem(n, k, math.prod(x.shape[:-1]), w.bits, w.group_size, x.dtype, *dtypes_of(w), gpu_name() or "")


def _detail(x: Any, w: Any) -> str:
    from pallas_kernels.choice import choose

    leaf = leaf_of(w)
    assert leaf is not None
    choice = choose(_problem(x, leaf))
    return f"{choice.kernel}, {choice.reason}"


def alternatives(x: Any, w: QuantizedTensor) -> list[tuple[dict[str, Any], Callable[[jax.Array, Any], jax.Array]]]:
    """The configurations of the chosen kernel that are worth timing: each as its row for tuned.json, and the product.

    Args:
      x: an array or ShapeDtypeStruct [M, K].
      w: a weight [N, K] that the backend supports; the products take it and others like it.
    """
    from pallas_kernels import tuning
    from pallas_kernels.lut_product import lut_product

    def product(x: jax.Array, w: QuantizedTensor, choice: Any) -> jax.Array:
        return lut_product(x, *arrays_of(w), bits=w.bits, group_size=w.group_size, choice=choice)

    problem = _problem(x, w)
    choices = tuning.candidates(problem)
    return [(tuning.row(problem, choice), functools.partial(product, choice=choice)) for choice in choices]


def _run(x: jax.Array, w: QuantizedTensor) -> jax.Array:
    # This is a rule for vmap and needs no CUDA. The two kernel packages don't import each other, so it is joined here.
    from cuda_ffi.folding import fold_rows
    from pallas_kernels.lut_product import lut_product

    @fold_rows
    def call(x, *operands):
        codes, (lut, scales, *offsets) = operands[:planes], operands[planes:]
        return lut_product(x, codes, lut, scales, offsets[0] if offsets else None, bits=w.bits, group_size=w.group_size)

    codes, lut, scales, offsets = arrays_of(w)
    planes = len(codes)
    return call(x, *codes, lut, scales, *([] if offsets is None else [offsets]))


PALLAS = Backend(name="pallas", supports=_supports, run=_run, detail=_detail)
