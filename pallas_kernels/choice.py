"""Which kernel computes a product, with what configuration, and why: decided by shapes, dtypes and the GPU's name."""

import dataclasses
import functools
import json
import re
from importlib import resources
from typing import Any

import jax.numpy as jnp

from pallas_kernels import mosaic_narrow, mosaic_wide, triton_dequantize, triton_gemm, triton_gemv
from pallas_kernels.layout import PLANES

CONFIGS: dict[str, Any] = {
    "triton_gemv": triton_gemv.Config,
    "triton_gemm": triton_gemm.Config,
    "triton_dequantize": triton_dequantize.Config,
    "mosaic_narrow": mosaic_narrow.Config,
    "mosaic_wide": mosaic_wide.Config,
}

# Up to this many rows of x, ...
MOST_ON_CUDA_CORES = 8  # ... decoding takes more time than multiplying without tensor cores
MOST_IN_TRITON = 64  # ... the products of lut_gemm take less time than writing W to memory
MOST_NARROW = 64  # ... the warpgroups' sums fit into shared memory

_HALVES = (jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A product x W^T.

    Attributes:
      n, k, m: outputs, inputs, rows of x.
      bits, group_size: of W; a group_size of at least k makes each row one group.
      x, lut, scales, offsets: dtypes; offsets is None where there are none.
      gpu: the GPU's name, as in jax.Device.device_kind.
    """

    n: int
    k: int
    m: int
    bits: int
    group_size: int
    x: Any
    lut: Any
    scales: Any
    offsets: Any
    gpu: str

    @property
    def hopper(self) -> bool:
        """Whether the GPU has wgmma, which later GPUs lack."""
        return re.search(r"\bG?H(100|200|800|20)\b", self.gpu) is not None


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel for a product.

    Attributes:
      kernel: a key of CONFIGS; XLA's product follows "triton_dequantize".
      config: the kernel's configuration.
      reason: why this kernel was chosen, in words.
    """

    kernel: str
    config: Any
    reason: str


def choose(problem: Problem) -> Choice:
    """The kernel for a product that `lut_product.why_not` accepts, configured by tuned.json where that has the case."""
    kernel, reason = _kernel(problem)
    tuned = _tuned().get((problem.gpu, kernel, problem.n, problem.k, problem.m, problem.bits, problem.group_size))
    if tuned is not None:
        return Choice(kernel, CONFIGS[kernel](**tuned), f"{reason}; configured by measurement of this very case")
    return Choice(kernel, _config(problem, kernel), reason)


def _kernel(problem: Problem) -> tuple[str, str]:
    m = problem.m
    rows = "one row of x" if m == 1 else f"{m} rows of x"
    misfit = _why_not_mosaic(problem)
    if misfit is None:
        if m == 1 and _gemv_us(problem) < _narrow_us(problem):
            return "triton_gemv", f"{rows}: CUDA cores keep pace, and the rows of W occupy more of them"
        if m <= MOST_NARROW:
            return "mosaic_narrow", f"{rows} on a Hopper GPU: wgmma, with the inputs split among warpgroups"
        wide, dense = _wide_us(problem, _columns(problem)), _dense_us(problem)
        if problem.n % 128 == 0 and wide < dense:
            times = f"about {wide:.0f} us, where decoding W to memory first would take {dense:.0f}"
            return "mosaic_wide", f"{rows} on a Hopper GPU: wgmma, {times}"
        return "triton_dequantize", f"{rows}: W is decoded to memory once, for XLA's product"
    if m <= MOST_ON_CUDA_CORES:
        return "triton_gemv", f"{rows}, on CUDA cores ({misfit})"
    if m <= MOST_IN_TRITON and _fits_triton_gemm(problem):
        return "triton_gemm", f"{rows}, on tensor cores through Triton ({misfit})"
    return "triton_dequantize", f"{rows}: W is decoded to memory once, for XLA's product ({misfit})"


def _why_not_mosaic(problem: Problem) -> str | None:
    """None where the kernels on wgmma can compute the product, else the reason in words."""
    floating = {jnp.dtype(d) for d in (problem.x, problem.lut, problem.scales, problem.offsets) if d is not None}
    group = problem.group_size
    if not problem.hopper:
        return f"wgmma is an instruction of Hopper GPUs, and this GPU is {problem.gpu}"
    if problem.bits != 4:
        return f"codes have {problem.bits} bits, but the kernels on wgmma decode 4"
    if len(floating) > 1 or problem.x not in _HALVES:
        return "x, table, scales and offsets are not all bfloat16 or all float16"
    if problem.n % 64 or problem.k % 128:
        return f"[N, K] = [{problem.n}, {problem.k}] is no multiple of [64, 128]"
    if group < problem.k and group % 128 and group not in (32, 64):
        return f"groups have {group} inputs, but the kernels on wgmma take 32, 64 and multiples of 128"
    return None


def _gemv_us(problem: Problem) -> float:
    """Microseconds that triton_gemv takes on an H100 for one row of x."""
    return 2.4 + 0.374e-6 * problem.n * problem.k


def _narrow_us(problem: Problem) -> float:
    """Microseconds that mosaic_narrow takes on an H100: 64 rows of W per multiprocessor, 512 inputs per turn."""
    return 2.4 + 1.36 * -(-problem.n // (64 * 132)) * problem.k / 512


def _columns(problem: Problem) -> int:
    """How many rows of x a block of mosaic_wide should take."""
    return min((256, 192, 128, 64), key=lambda columns: _wide_us(problem, columns))


def _wide_us(problem: Problem, columns: int) -> float:
    """Microseconds that mosaic_wide takes on an H100: a block's steps, times the blocks that run one after the other.

    A step was measured to take 0.83, 1.0, 1.23 and 1.45 us with 64, 128, 192 and 256 rows of x.
    """
    blocks = problem.n // 128 * -(-problem.m // columns)
    return -(-blocks // 132) * problem.k / 128 * (0.6 + columns / 300)


def _dense_us(problem: Problem) -> float:
    """Microseconds that decoding W and XLA's product take on an H100: at 2.7 TB/s, with 750 TFLOP/s in the product."""
    weights = problem.n * problem.k
    return 2.5 * weights / 2.7e6 + max(2 * weights / 2.7e6, 2 * problem.m * weights / 7.5e8)


def _fits_triton_gemm(problem: Problem) -> bool:
    return problem.bits == 4 and problem.x == problem.lut and problem.x in _HALVES and problem.group_size >= 32


def _config(problem: Problem, kernel: str) -> Any:
    """The fastest of a few configurations for 8192 x 8192 on an H100, made smaller where a matrix needs it."""
    m, k = problem.m, problem.k
    if kernel == "triton_gemv":
        bytes_of_row = -(-k * PLANES[problem.bits][0] // 8)
        columns = min(512, max(16, 1 << (bytes_of_row - 1).bit_length()))
        # Each lane should have 16 bytes of a tile.
        warps = max(1, min(4, 8 * columns // 512))
        return triton_gemv.Config(columns=columns, warps=warps, rows_of_x=1 if m == 1 else 2 if m == 2 else 4)
    if kernel == "triton_gemm":
        return triton_gemm.Config(split=max(1, min(4, k // 1024)))
    if kernel == "mosaic_narrow":
        columns = next(c for c in (8, 16, 32, 64) if c >= m)
        return mosaic_narrow.Config(columns, warpgroups=4 if columns < 64 else 2, stages=4)
    if kernel == "mosaic_wide":
        columns = _columns(problem)
        return mosaic_wide.Config(columns, stages={64: 8, 128: 5, 192: 4, 256: 3}[columns])
    columns = min(2048, max(16, 1 << ((k + 1) // 2 - 1).bit_length()))
    return triton_dequantize.Config(columns=columns, warps=max(1, min(4, 4 * columns // 512)))


@functools.cache
def _tuned() -> dict[tuple[Any, ...], dict[str, Any]]:
    """The configurations that were found by measuring, from tuned.json."""
    rows = json.loads(resources.files("pallas_kernels").joinpath("tuned.json").read_text(encoding="utf-8"))
    names = ("gpu", "kernel", "n", "k", "m", "bits", "group_size")
    return {tuple(row[name] for name in names): row["config"] for row in rows}
