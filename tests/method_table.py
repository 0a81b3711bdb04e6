"""The table of methods that are held to the laws of test_methods.py, and the layer on which they are."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax import statistics, weights
from any4_jax.methods import (
    AF4,
    AWQ,
    BCQ,
    FP4,
    FPQ,
    GPTQ,
    MX4,
    NF4,
    Any4,
    Int,
    SiteWeights,
    SmoothQuant,
    SpQR,
    quantize,
)
from any4_jax.methods.apply import apply_site
from any4_jax.methods.base import scope_of

N, K = 12, 40

FIXED = [
    Int(bits=bits, zero_point=zero, group_size=16)
    for bits, zero in ((2, "float"), (3, "integer"), (5, "float"), (8, "integer"))
]
FIXED += [Int(bits=3, symmetric=True, group_size=16)]
FIXED += [NF4(group_size=16), FP4(group_size=16), AF4(group_size=16), MX4(), MX4(scale="ocp", group_size=16)]
FIXED += [Int(bits=3, group_size=16, clip=True), NF4(group_size=24, clip=True), MX4(clip=True)]
FIXED += [Int(scale_dtype="float32", table_dtype="float32"), NF4(group_size=1), Int(group_size=7)]
# Every compiled solver costs seconds: few rows, each crossing several options.
LEARNED = [
    Any4(group_size=16),
    Any4(bits=2, group_size=16, symmetric=True, solver="lloyd", init="quantile", refit=True, table_dtype="int8"),
    Any4(bits=3, group_size=24, solver="gradient", max_iter=30, keep_outliers=True, refit=False, sample_tokens=48),
    Any4(bits=3, group_size=16, per_row=False, bias_pow=0.8, table_dtype="int8"),
    Any4(group_size=16, keep_outliers=True, table_dtype="int8"),
]
COMPENSATED = [
    GPTQ(Int(bits=3, group_size=16)),
    GPTQ(Int(group_size=16, zero_point="float"), act_order=False, static_groups=False, block=12),
    GPTQ(NF4(group_size=7), static_groups=False),
    GPTQ(MX4(), act_order=False, block=9),
    GPTQ(LEARNED[0], static_groups=False, act_order=False),
    GPTQ(LEARNED[-1], static_groups=False),
    GPTQ(LEARNED[1], refits=1),
]
# A factor for each input that depends on the inputs alone scales with no power of the weights; one group a weight, so
# that a row of equal weights is close to equal again.
SITES = [SmoothQuant(Int(bits=8, group_size=1), alpha=1.0, size="max")]
SITES += [AWQ(Int(bits=3, group_size=16), ratios=5, clips=3)]
# Rows are groups. The small search is of formats and biases.
FLOATS = [FPQ(rounds=1, steps=2, low=0.9, high=1.1, tokens=16), FPQ(8, None, rounds=1, steps=1, tokens=16)]
# Sums of leaves.
BINARY = [BCQ(bits=3, group_size=16, rounds=4), BCQ(bits=2, rounds=4, offset=True, sample_weight="second_moment")]
SPARSE = [SpQR(scale_bits=None, offset_bits=None), SpQR(NF4(group_size=16), coded_rows=5, act_order=False, block=8)]
ROWS_SHARE = SPARSE[1:]
"""Whose rows share what is stored, and depend on each other."""
EVERY = FIXED + LEARNED + COMPENSATED + SITES + FLOATS + BINARY + SPARSE


def layer(seed: int = 0) -> np.ndarray:
    """Heavy-tailed weights [N, K] with an all-zero row, a constant row and an all-zero group."""
    w = np.random.default_rng(seed).standard_t(3, (N, K)).astype(np.float32)
    w[2], w[5], w[7, :16] = 0, 0.75, 0
    return w


@functools.cache
def stats() -> statistics.Gathered:
    rng = np.random.default_rng(9)
    x = rng.normal(0.2, 10.0 ** rng.uniform(-1, 1, K), (64, K)).astype(np.float32)
    needs = [s for method in EVERY for s in method.needs]
    return statistics.from_activations(x, statistics=dict.fromkeys(needs))


dequantize = jax.jit(weights.dequantize)


def run(w: np.ndarray, method: Any, path: str = "the weight"):
    """The operator of a matrix; for a site of this one matrix, with its factors."""
    if scope_of(method) == "matrix":
        return quantize(jnp.asarray(w), method, stats(), path=path)
    made = apply_site(SiteWeights({"w": jnp.asarray(w)}), method, stats(), path)
    operator = made.results["w"].operator
    return operator if made.input_scale is None else weights.ScaleInput(operator, made.input_scale)
