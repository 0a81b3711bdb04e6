"""The golden files of the families: small random models with torch's logits, and GGUF files with those of llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from any4_jax.models import Decoder, from_tensors, read_config

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = tuple(sorted(path.stem.removeprefix("family_") for path in GOLDEN.glob("family_*.npz")))
VARIANTS = tuple(name for name in VARIANTS if name != "gguf")
GGUFS = tuple(sorted(path.stem.removeprefix("gguf_") for path in GOLDEN.glob("gguf_*.gguf")))
# One variant of each family; what other variants differ in concerns the forward pass alone.
FAMILIES = (
    "gemma2",
    "gemma3",
    "mistral",
    "mixtral",
    "opt",
    "opt_post_norm",
    "qwen2_window",
    "qwen3",
    "qwen3_moe_mixed",
)


class Golden(NamedTuple):
    """A golden model.

    Attributes:
        configs: config.json as transformers 4 and as transformers 5 write it.
        tokens: int32 [B, T].
        logits: float32 [B, T, V], of the first `lengths` [B] tokens of each row.
    """

    configs: tuple[dict[str, Any], dict[str, Any]]
    tensors: dict[str, np.ndarray]
    tokens: np.ndarray
    logits: np.ndarray
    lengths: np.ndarray

    def model(self) -> Decoder:
        return from_tensors(read_config(self.configs[0]), self.tensors, np.float32)


def golden(variant: str) -> Golden:
    with np.load(GOLDEN / f"family_{variant}.npz") as file:
        arrays = dict(file)
    configs = json.loads(str(arrays.pop("config"))), json.loads(str(arrays.pop("config_5")))
    tokens, logits = arrays.pop("tokens"), arrays.pop("logits")
    lengths = arrays.pop("lengths", np.full(len(tokens), tokens.shape[1]))
    return Golden(configs, arrays, tokens, logits, lengths)


def error(got: Any, wanted: np.ndarray) -> float:
    """The largest difference in units of the largest wanted number."""
    return float(np.max(np.abs(np.asarray(got) - wanted)) / np.max(np.abs(wanted)))
