"""A small Llama in the form of Hugging Face: its config, and folders with its tensors."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from any4_jax.models.hf import read_config

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "attention_bias": True,
    "mlp_bias": True,
}
CONFIG = read_config(BASE)


def write_folder(folder: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """A Hugging Face folder of BASE, its tensors in one file or dealt out to shards."""
    (folder / "config.json").write_text(json.dumps(BASE))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    parts: dict[str, list[str]] = {f"model-{i}.safetensors": sorted(tensors)[i::shards] for i in range(shards)}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
