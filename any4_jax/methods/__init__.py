"""Quantization methods. Each is a frozen dataclass that is configuration, flags and manifest entry at once."""

from any4_jax.methods.any4 import Any4
from any4_jax.methods.apply import quantize
from any4_jax.methods.awq import AWQ
from any4_jax.methods.base import (
    AnyMethod,
    Block,
    BlockMethod,
    BlockResult,
    Method,
    Result,
    SiteMethod,
    SiteResult,
    SiteWeights,
)
from any4_jax.methods.bcq import BCQ
from any4_jax.methods.fields import Fields
from any4_jax.methods.fpq import FPQ
from any4_jax.methods.gptq import GPTQ
from any4_jax.methods.lifts import on_block, on_site
from any4_jax.methods.rtn import AF4, FP4, MX4, NF4, Int
from any4_jax.methods.smoothquant import SmoothQuant
from any4_jax.methods.spec import CATALOGUE
from any4_jax.methods.spqr import SpQR
from any4_jax.methods.tune import Tune
from any4_jax.methods.zeroquant import ZeroQuant

__all__ = [
    "AF4",
    "AWQ",
    "BCQ",
    "CATALOGUE",
    "FP4",
    "FPQ",
    "GPTQ",
    "MX4",
    "NF4",
    "Any4",
    "AnyMethod",
    "Block",
    "BlockMethod",
    "BlockResult",
    "Fields",
    "Int",
    "Method",
    "Result",
    "SiteMethod",
    "SiteResult",
    "SiteWeights",
    "SmoothQuant",
    "SpQR",
    "Tune",
    "ZeroQuant",
    "on_block",
    "on_site",
    "quantize",
]
