"""The configurations of a kernel that are worth timing, and the row of tuned.json for the fastest."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from pallas_kernels import mosaic_narrow, mosaic_wide
from pallas_kernels.choice import Choice, Problem, choose

# The most bytes of shared memory that a block may have on a Hopper GPU.
_SHARED_BYTES = 232448


def candidates(problem: Problem) -> list[Choice]:
    """The choice of `choose`, then the same kernel with the other configurations that fit."""
    chosen = choose(problem)
    others = [c for c in _configs(chosen.kernel, chosen.config, problem) if c != chosen.config]
    return [chosen, *(Choice(chosen.kernel, config, "a candidate") for config in others)]


def row(problem: Problem, choice: Choice) -> dict[str, Any]:
    """A row of tuned.json, which `choose` finds for this GPU and these sizes."""
    sizes = {name: getattr(problem, name) for name in ("gpu", "n", "k", "m", "bits", "group_size")}
    return {**sizes, "kernel": choice.kernel, "config": dataclasses.asdict(choice.config)}


def _configs(kernel: str, config: Any, problem: Problem) -> Iterator[Any]:
    if kernel == "triton_gemv":
        for rows, columns, warps in itertools.product((4, 8, 16), (128, 256, 512, 1024), (2, 4, 8)):
            if rows * columns >= 512 * warps and columns <= 2 * config.columns:
                yield dataclasses.replace(config, rows=rows, columns=columns, warps=warps)
    elif kernel == "triton_gemm":
        for stages, split in itertools.product((2, 3, 4), (1, 2, 4, 8)):
            if split <= problem.k // 256:
                yield dataclasses.replace(config, stages=stages, split=split)
    elif kernel == "triton_dequantize":
        for rows, columns in itertools.product((2, 4, 8), (1024, 2048, 4096)):
            yield dataclasses.replace(config, rows=rows, columns=columns)
    elif kernel == "mosaic_narrow":
        for warpgroups, stages in itertools.product((2, 3, 4), (2, 3, 4, 6)):
            shared = warpgroups * (stages * (64 * 64 + config.columns * 256) + config.columns * 256) + 1024
            if shared <= _SHARED_BYTES:
                yield mosaic_narrow.Config(config.columns, warpgroups, stages)
    else:
        for columns, stages in itertools.product((64, 128, 192, 256), (3, 4, 5, 8)):
            if stages * (128 * 64 + columns * 256) + 1024 <= _SHARED_BYTES and columns < problem.m + 64:
                yield mosaic_wide.Config(columns, stages)
