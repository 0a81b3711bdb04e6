"""The models that README.md and the examples name, cut to their first blocks: a program has a part for each block, and
the blocks are alike."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from any4_jax import data
from any4_jax.data import assets
from any4_jax.models import loading, tiny
from any4_jax.models.gguf_reader import read_gguf
from any4_jax.models.hf import from_tensors


def shorten(patch: pytest.MonkeyPatch, folder: Path, blocks: int) -> None:
    """Lets "tiny" and "smollm2" stand for their first blocks; writes the former into the folder."""
    with data.bundled("stories260k") as whole:
        shutil.copytree(whole, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks}))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensors[name] for name in tensors if _is_kept(name, blocks)}, folder / "model.safetensors")
    patch.setattr(tiny, "bundled", lambda name: contextlib.nullcontext(folder))

    def smollm2(dtype: Any) -> Any:
        config, tensors, tokenizer = read_gguf(assets.fetch_smollm2())
        config = dataclasses.replace(config, num_hidden_layers=blocks)
        model = from_tensors(config, {name: tensors[name] for name in tensors if _is_kept(name, blocks)}, dtype)
        model.tokenizer = tokenizer
        return model

    patch.setitem(loading.NAMED, "smollm2", smollm2)


def _is_kept(name: str, blocks: int) -> bool:
    index = re.search(r"\.layers\.(\d+)\.", name)
    return index is None or int(index[1]) < blocks
